"""Read networks exported to `.onnx` and `.pt2`: their metadata and their logits."""

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

FACTS_NAME = "resnet_in1k.json"
"""Entry in an exported file with the sha256 of the original weights, the class names and the preprocessing."""
SUFFIXES = (".onnx", ".pt2")


class ExportedNetwork(torch.nn.Module):
    """Logits of an exported network, computed on the CPU wherever the images are.

    `image_size`, in pixels, and `batch_size` are those that the network was exported for; 0 for any.
    """

    def __init__(self, logits: Callable[[np.ndarray], np.ndarray], image_size: int, batch_size: int, num_outputs: int):
        super().__init__()
        self._logits, self._batch_size = logits, batch_size
        self.image_size, self.num_outputs = image_size, num_outputs

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) float32, normalized, to (B, C) float32."""
        parts = []
        for part in images.cpu().split(self._batch_size or len(images)):
            missing = max(0, self._batch_size - len(part))  # a network for a fixed batch size gets zeros for the rest
            full = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            parts.append(torch.from_numpy(self._logits(full.contiguous().numpy())[: len(part)]))
        return torch.cat(parts).to(images.device)


def is_exported(file: Path) -> bool:
    return file.suffix in SUFFIXES


def read_facts(file: Path) -> dict[str, Any]:
    """Return what `export.py` wrote into the file, {} if another program exported it; raises UserError."""
    with _translate_errors(file):
        if file.suffix == ".onnx":
            text = _onnx_session(file).get_modelmeta().custom_metadata_map.get(FACTS_NAME, "")
        else:
            with zipfile.ZipFile(file) as archive:
                entries = [name for name in archive.namelist() if name.endswith(f"extra/{FACTS_NAME}")]
                text = archive.read(entries[0]).decode("utf-8") if entries else ""
        return dict(json.loads(text or "{}"))


def load_exported(file: Path, suffix: str = "") -> ExportedNetwork:
    """Load an exported network; `suffix` gives its format if the file's own suffix differs.

    Raises:
        UserError: if the file cannot be read, a package is missing, or the network does not map images to logits.
    """
    with _translate_errors(file):
        return _load_onnx(file) if (suffix or file.suffix) == ".onnx" else _load_pt2(file)


@contextlib.contextmanager
def _translate_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{file} needs {error.name}: pip install 'resnet-in1k[export]'") from None
    except UserError:
        raise
    except Exception as error:  # torch and ONNX Runtime raise many kinds of errors for damaged files
        raise UserError(f"{file} cannot be read as an exported network ({first_line(error)})") from None


def _onnx_session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])


def _load_onnx(file: Path) -> ExportedNetwork:
    session = _onnx_session(file)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    sizes = _sizes([each.shape for each in inputs], [each.shape for each in outputs], file)
    return ExportedNetwork(lambda images: session.run(None, {inputs[0].name: images})[0], *sizes)


def _load_pt2(file: Path) -> ExportedNetwork:
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable, "")
    os.environ[variable] = "1"  # else torch.export.load executes pickles that the weights-only reader rejects
    try:
        with file.open("rb") as stream:
            program = torch.export.load(stream)
    finally:
        os.environ[variable] = before
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    signature = program.graph_signature
    inputs = [values[name].shape for name in signature.user_inputs]
    outputs = [values[name].shape for name in signature.user_outputs]
    module = program.module()
    return ExportedNetwork(lambda images: module(torch.from_numpy(images)).numpy(), *_sizes(inputs, outputs, file))


def _sizes(inputs: list[Any], outputs: list[Any], file: Path) -> tuple[int, int, int]:
    """Return image size, batch size and number of outputs from the shapes of all inputs and outputs; 0 if variable.

    Raises:
        UserError: unless there is one input, (B, 3, S, S), and one output, (B, C).
    """
    shapes = [[size if isinstance(size, int) else 0 for size in shape] for shape in (*inputs, *outputs)]
    if len(inputs) == len(outputs) == 1 and len(shapes[0]) == 4 and shapes[0][1] in (0, 3) and shapes[1][-1]:
        return shapes[0][2], shapes[0][0], shapes[1][-1]
    raise UserError(f"{file} does not map images, (B, 3, S, S), to logits, (B, C)")
