"""Exported networks, `.onnx` and `.pt2`: what was written into them, and their logits."""

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
"""Of the entry that says what the network was exported from, and how its images are prepared."""


class ExportedNetwork(torch.nn.Module):
    """The logits of an exported network; it computes on the CPU, wherever the images are."""

    def __init__(self, logits: Callable[[np.ndarray], np.ndarray], image_size: int, batch_size: int, num_outputs: int):
        super().__init__()
        self._logits = logits
        self.image_size = image_size
        """Side of the images that it takes, in pixels; 0 for any."""
        self._batch_size = batch_size
        """That it takes; 0 for any."""
        self.num_outputs = num_outputs

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32, normalized, to (B, C) float32."""
        parts = []
        for part in images.cpu().split(self._batch_size or len(images)):
            missing = max(0, self._batch_size - len(part))
            full = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            parts.append(torch.from_numpy(self._logits(full.contiguous().numpy())[: len(part)]))
        return torch.cat(parts).to(images.device)

    def check_image_size(self, image_size: int, file: Path) -> None:
        if self.image_size not in (0, image_size):
            raise UserError(f"{file} takes images of {self.image_size} px, not of {image_size}; leave out --image-size")


def is_exported(file: Path) -> bool:
    return file.suffix in FORMATS


def read_facts(file: Path) -> dict[str, Any]:
    """What `export.py` wrote into the file; {} if it was exported by another program.

    Raises:
        UserError: if it cannot be read.
    """
    with _explained(file):
        text = FORMATS[file.suffix][0](file)
        facts = json.loads(text) if text else {}
        if not isinstance(facts, dict):
            raise ValueError(f"its {FACTS_NAME} is no object")
        return facts


def load_exported(file: Path, suffix: str = "") -> ExportedNetwork:
    """
    Args:
        suffix: of the format, where the file's own says another.

    Raises:
        UserError: if it cannot be read, a package is missing, or it does not map images to logits.
    """
    with _explained(file):
        return FORMATS[suffix or file.suffix][1](file)


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{file} needs {error.name}: pip install 'resnet-in1k[export]'") from None
    except UserError:
        raise
    except Exception as error:  # the two libraries raise all kinds of errors for files that are not theirs
        raise UserError(f"{file} cannot be read as an exported network ({first_line(error)})") from None


def _onnx_session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are no lines for a user
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])


def _read_onnx_facts(file: Path) -> str:
    return _onnx_session(file).get_modelmeta().custom_metadata_map.get(FACTS_NAME, "")


def _load_onnx(file: Path) -> ExportedNetwork:
    session = _onnx_session(file)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = _fixed(inputs[0].shape)
    num_outputs = _fixed(outputs[0].shape)[-1]
    if len(inputs) != 1 or len(outputs) != 1 or len(shape) != 4 or shape[1] not in (0, 3) or not num_outputs:
        raise UserError(f"{file} does not take images, (B, 3, S, S), and give logits, (B, C)")
    name = inputs[0].name
    return ExportedNetwork(lambda images: session.run(None, {name: images})[0], shape[2], shape[0], num_outputs)


def _read_pt2_facts(file: Path) -> str:
    with zipfile.ZipFile(file) as archive:
        entries = [name for name in archive.namelist() if name.endswith(f"extra/{FACTS_NAME}")]
        return archive.read(entries[0]).decode("utf-8") if entries else ""


def _load_pt2(file: Path) -> ExportedNetwork:
    program = load_program(file)
    signature = program.graph_signature
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    shapes = [
        _fixed(values[name].shape) for (name,) in (signature.user_inputs, signature.user_outputs)
    ]  # unpacking fails where there is not one of each
    if len(shapes[0]) != 4 or shapes[0][1] != 3 or not shapes[1][-1]:
        raise UserError(f"{file} does not take images, (B, 3, S, S), and give logits, (B, C)")
    module = program.module()
    batch_size, _, image_size, _ = shapes[0]
    return ExportedNetwork(
        lambda images: module(torch.from_numpy(images)).numpy(), image_size, batch_size, shapes[1][-1]
    )


def load_program(file: Path) -> "torch.export.ExportedProgram":
    """torch.export.load, which falls back to executing pickles by itself; here it may not."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name, "")
    os.environ[name] = "1"
    try:
        with file.open("rb") as stream:
            return torch.export.load(stream)
    finally:
        os.environ[name] = before


def _fixed(shape: Any) -> list[int]:
    """Sizes; 0 for one that may vary."""
    return [size if isinstance(size, int) else 0 for size in shape]


FORMATS: dict[str, tuple[Callable[[Path], str], Callable[[Path], ExportedNetwork]]] = {
    ".onnx": (_read_onnx_facts, _load_onnx),
    ".pt2": (_read_pt2_facts, _load_pt2),
}
"""By suffix: what reads the facts, and the network."""
