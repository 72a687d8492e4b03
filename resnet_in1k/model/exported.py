"""Read networks exported to `.onnx` and `.pt2`: their metadata and their logits."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

FACTS_NAME = "resnet_in1k.json"
"""Entry in an exported file with the sha256 of the original weights, the class names and the preprocessing."""
SUFFIXES = (".onnx", ".pt2")
DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


class ExportedNetwork(torch.nn.Module):
    """Logits of an exported network, computed on the CPU wherever the images are.

    `image_size`, in pixels, and `batch_size` are those that the network was exported for; 0 for any. `facts` is what
    export.py wrote into the file, {} if another program exported it.
    """

    architecture = "an exported network, computed on the CPU"

    def __init__(self, logits: Callable[[Tensor], Tensor], shapes: list[list[int]], facts: dict[str, Any]):
        super().__init__()
        (self._batch_size, _, _, self.image_size), (_, self.num_outputs) = shapes
        self._logits, self.facts = logits, facts

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) float32, normalized, to (B, C) float32; raises UserError if the network fails."""
        parts = []
        for part in images.cpu().split(self._batch_size or len(images)):
            missing = max(0, self._batch_size - len(part))  # a network for a fixed batch size gets zeros for the rest
            full = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            try:
                parts.append(self._logits(full.contiguous())[: len(part)].float())
            except Exception as error:  # ONNX Runtime has errors of its own
                raise UserError(f"the network fails for images {tuple(full.shape)}: {first_line(error)}") from None
        return torch.cat(parts).to(images.device)


def load_exported(file: Path) -> ExportedNetwork:
    """Load a network; raises UserError if it cannot be read, a package is missing, or it does not map images to
    logits."""
    try:
        logits, inputs, outputs, facts = _load_onnx(file) if file.suffix == ".onnx" else _load_pt2(file)
        shapes = [[size if isinstance(size, int) else 0 for size in shape] for shape in (*inputs, *outputs)]
        if (len(inputs), [len(shape) for shape in shapes]) != (1, [4, 2]) or shapes[0][1] not in (0, 3):
            raise ValueError("it does not map images, (B, 3, S, S), to logits, (B, C)")
        return ExportedNetwork(logits, shapes, dict(json.loads(facts or "{}")))
    except ModuleNotFoundError as error:
        raise UserError(f"{file} needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    except Exception as error:  # torch and ONNX Runtime raise many kinds of errors for damaged files
        raise UserError(f"{file} cannot be read as an exported network ({first_line(error)})") from None


def _load_onnx(file: Path) -> tuple[Callable[[Tensor], Tensor], list[Any], list[Any], str]:
    """Return the function, the shapes of its inputs and outputs, and the text of its facts."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    # By its path: weights outside the file are found next to it, not in the working directory.
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    name, dtype = inputs[0].name, DTYPES.get(inputs[0].type)
    if dtype is None:
        raise ValueError(f"its input is {inputs[0].type}; export it for float32 images, normalized outside")
    shapes = [each.shape for each in inputs], [each.shape for each in outputs]
    facts = session.get_modelmeta().custom_metadata_map.get(FACTS_NAME, "")
    return lambda images: torch.from_numpy(session.run(None, {name: images.to(dtype).numpy()})[0]), *shapes, facts


def _load_pt2(file: Path) -> tuple[Callable[[Tensor], Tensor], list[Any], list[Any], str]:
    """Return the same of torch.export's archive."""
    variable, facts = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", {FACTS_NAME: ""}
    before = os.environ.get(variable, "")
    os.environ[variable] = "1"  # else torch.export.load executes pickles that the weights-only reader rejects
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it logs the tracebacks of damaged files
    try:
        with file.open("rb") as stream:
            program = torch.export.load(stream, extra_files=facts)
    finally:
        os.environ[variable] = before
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    signature, module = program.graph_signature, program.module()
    inputs, outputs = ([values[name] for name in names] for names in (signature.user_inputs, signature.user_outputs))
    if not (dtype := inputs[0].dtype).is_floating_point:
        raise ValueError(f"its input is {dtype}; export it for float32 images, normalized outside")
    shapes = ([each.shape for each in values] for values in (inputs, outputs))
    return lambda images: module(images.to(dtype)), *shapes, facts[FACTS_NAME]
