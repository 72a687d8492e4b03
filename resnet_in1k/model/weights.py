"""Read weights of any origin, and write safetensors files with torchvision's keys."""

import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from resnet_in1k.run_folder import WEIGHTS_NAME
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

PICKLE_NAME = "pytorch_model.bin"
"""Weights in repositories that have no safetensors file."""
STATE_NAME = "state.json"
"""File in a checkpoint folder with the sha256 of each of its safetensors files."""
WRAPPERS = ("state_dict", "model")
"""Keys under which training scripts save a state dict."""
RENAMED = {
    r"^(module\.|_orig_mod\.)+": "",  # DDP and torch.compile, in any order and number; the others are transformers'
    r"^resnet\.embedder\.embedder\.convolution": "conv1",
    r"^resnet\.embedder\.embedder\.normalization": "bn1",
    r"^resnet\.encoder\.stages\.(\d+)\.layers": lambda match: f"layer{int(match[1]) + 1}",
    r"\.layer\.(\d+)\.convolution": lambda match: f".conv{int(match[1]) + 1}",
    r"\.layer\.(\d+)\.normalization": lambda match: f".bn{int(match[1]) + 1}",
    r"\.shortcut\.convolution": ".downsample.0",
    r"\.shortcut\.normalization": ".downsample.1",
    r"^classifier\.1": "fc",
}
"""Parts of other projects' keys, and what torchvision has in their place."""


def torchvision_key(key: str) -> str:
    for pattern, name in RENAMED.items():
        key = re.sub(pattern, name, key)
    return key


def weights_file(checkpoint: Path) -> Path:
    """Return the file that `--ckpt` names: the path itself, or `model.safetensors` in a run, checkpoint or hub folder.

    Raises UserError if there is none, or its sha256 differs from the one recorded in its checkpoint's state.json.
    """
    if not checkpoint.exists():
        raise UserError(f"{checkpoint}: no such file or folder; give a run folder, checkpoint folder or weights file")
    candidates = [checkpoint] if checkpoint.is_file() else [checkpoint / WEIGHTS_NAME, checkpoint / PICKLE_NAME]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise UserError(f"{checkpoint}: no {WEIGHTS_NAME} in it; a run has one after its first epoch")
    state = file.with_name(STATE_NAME)
    if state.is_file():
        with files.content_errors(state):
            recorded = files.read_json(state)["sha256"].get(file.name)
        if recorded and recorded != files.sha256_of(file):  # a file with a flipped bit is still a valid one
            raise UserError(f"{file} is damaged: its sha256 does not match the recorded one; take another checkpoint")
    return file


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the state dict in a safetensors file or an old `.pth`, on the CPU, with torchvision's keys.

    Raises UserError if the file is damaged or holds anything but tensors; no pickled code is executed.
    """
    if file.suffix in (".onnx", ".pt2"):
        raise UserError(f"{file} is an exported network, for evaluate.py only; give the weights it was exported from")
    try:
        if file.suffix == ".safetensors":
            state = files.retry_once(lambda: safetensors.torch.load_file(file))
        else:
            state = files.retry_once(lambda: torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # both readers raise many kinds of errors for files that are not theirs
        problem = f"{file} cannot be read as plain tensors ({first_line(error)})"
        raise UserError(f"{problem}; no code in it was executed: take another checkpoint") from None
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not (isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{file} is not a state dict, a mapping from names to tensors")
    return {torchvision_key(key): tensor for key, tensor in state.items()}


def weights_to_save(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copy a model's state dict to contiguous CPU tensors with clean keys."""
    return {torchvision_key(key): contiguous_copy(tensor) for key, tensor in model.state_dict().items()}


def contiguous_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to contiguous CPU memory, since safetensors rejects channels_last tensors."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous CPU tensors to a safetensors file; equal tensors give equal bytes."""
    # safetensors' own save_file ignores the umask: only the owner could read its files.
    path.write_bytes(safetensors.torch.save(dict(tensors), metadata={"format": "pt"}))
