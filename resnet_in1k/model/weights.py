"""Read weights of any origin, and write safetensors files with torchvision's keys."""

import argparse
import contextlib
import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from resnet_in1k.recipes.recipe import PublishedWeights
from resnet_in1k.run_folder import WEIGHTS_NAME
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

INDEX_NAME = "model.safetensors.index.json"
"""Names of the safetensors files of weights that are in several, by tensor."""
PICKLE_NAME = "pytorch_model.bin"
"""Weights in repositories that have no safetensors file."""
EMA_NAME = "ema.safetensors"
"""Moving average in a checkpoint folder."""
STATE_NAME = "state.json"
"""File in a checkpoint folder with the sha256 of each of its safetensors files."""
RENAMED = {
    r"(^|\.)((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+": r"\1",  # torch.compile, FSDP
    r"^(module\.)+": "",  # DDP
    r"(^|\.)([4-7])\.(\d+)\.(?=conv|bn|downsample)": lambda match: f"{match[1]}layer{int(match[2]) - 3}.{match[3]}.",
    # transformers
    r"(\bresnet\.)?\bembedder\.embedder\.convolution": "conv1",
    r"(\bresnet\.)?\bembedder\.embedder\.normalization": "bn1",
    r"(\bresnet\.)?\bencoder\.stages\.(\d+)\.layers": lambda match: f"layer{int(match[2]) + 1}",
    r"\.layer\.(\d+)\.convolution": lambda match: f".conv{int(match[1]) + 1}",
    r"\.layer\.(\d+)\.normalization": lambda match: f".bn{int(match[1]) + 1}",
    r"\.shortcut\.convolution": ".downsample.0",
    r"\.shortcut\.normalization": ".downsample.1",
}
"""Parts of other projects' keys, and what torchvision has in their place."""
SAVE_TENSORS = "where it was made, save the tensors alone: torch.save(model.state_dict(), 'weights.pth')"
WEB_PAGE = "a web page; download the file itself, from the Hub by an address with /resolve/ in place of /blob/"
KERAS = "a file of Keras; weights of PyTorch are needed"
KINDS = {
    b"version https://git-lfs": "a Git LFS pointer; run git lfs pull in its repository, or download the file itself",
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"\x89hdf": KERAS,
    b"\x1f\x8b": "a compressed archive; unpack it",
}
"""Kinds of files that users give in place of weights, by their first bytes in lower case."""


def torchvision_key(key: str) -> str:
    for pattern, name in RENAMED.items():
        key = re.sub(pattern, name, key)
    return key


def weights_file(checkpoint: Path, wanted: PublishedWeights | None = None) -> Path:
    """Return the file that `--ckpt` names: the path itself, or `model.safetensors` in a run, checkpoint or hub folder,
    where `ema.safetensors` is taken if averages are wanted.

    Raises UserError if there is none, or its sha256 differs from the one recorded in its checkpoint's state.json.
    """
    if not checkpoint.exists():
        raise UserError(f"{checkpoint}: no such file or folder; give a run folder, checkpoint folder or weights file")
    names = [EMA_NAME] * (wanted == "ema") + [WEIGHTS_NAME, INDEX_NAME, PICKLE_NAME]
    candidates = [checkpoint] if checkpoint.is_file() else [checkpoint / name for name in names]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        advice = "a run has one after its first epoch; in another program's folder, give the path of the file"
        raise UserError(f"{checkpoint}: no {WEIGHTS_NAME} in it; {advice}")
    state = file.with_name(STATE_NAME)
    if state.is_file():
        with files.content_errors(state):
            recorded = files.read_json(state)["sha256"].get(file.name)
        if recorded and recorded != files.sha256_of(file):  # a file with a flipped bit is still a valid one
            raise UserError(f"{file} is damaged: its sha256 does not match the recorded one; take another checkpoint")
    return file


def _parts(file: Path) -> list[Path]:
    """Return the safetensors files that an index names, or the file itself if it is not an index."""
    if not file.name.endswith(".index.json"):
        return [file]
    with files.content_errors(file):
        return sorted({file.with_name(Path(name).name) for name in files.read_json(file)["weight_map"].values()}) or [
            file
        ]


def sha256_of_weights(file: Path) -> str:
    """Return the file's sha256 or, for an index, the sha256 of those of its parts."""
    with files.user_errors():
        first, *others = map(files.sha256_of, _parts(file))
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors in a file, on the CPU, by their keys as torchvision has them, after those of the mappings that
    they are in: `state_dict.conv1.weight`.

    Raises UserError if the file is damaged or holds other Python objects than plain values; no code in it is executed.
    """
    if file.suffix in (".onnx", ".pt2"):
        raise UserError(f"{file} is an exported network, for evaluate.py only; give the weights it was exported from")
    tensors = {torchvision_key(key): value for part in _parts(file) for key, value in _flatten(_read(part))}
    if not tensors:
        raise UserError(f"{file} is not a state dict, a mapping from names to tensors; {SAVE_TENSORS}")
    return tensors


def _read(file: Path) -> object:
    try:
        with file.open("rb") as stream:
            is_safetensors = stream.read(9)[8:] == b"{"  # after the length of its header, whatever the file's name
        if is_safetensors:
            return files.retry_once(lambda: safetensors.torch.load_file(file))
        # Training scripts save their arguments next to the weights: plain values in a class without code of its own.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it describes files that it then refuses
            return files.retry_once(lambda: torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # both readers raise many kinds of errors for other files
        raise UserError(f"{file} cannot be read as plain tensors: {_why_unreadable(file, error)}") from None


def _why_unreadable(file: Path, error: Exception) -> str:
    """Return what a file is in place of weights, and what to do. torch's own advice is to execute the code in it."""
    with files.user_errors(), file.open("rb") as stream:
        start = stream.read(100).lstrip().lower()
    kinds = [kind for beginning, kind in KINDS.items() if start.startswith(beginning)]
    names = []
    with contextlib.suppress(Exception):  # no archive, or a damaged one
        names = zipfile.ZipFile(file).namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        kinds = [f"a TorchScript archive; {SAVE_TENSORS}"]
    elif names and not any(name.endswith("/data.pkl") for name in names):
        kinds = [KERAS if "model.weights.h5" in names else f"an archive of {shorten(names)}; unpack it"]
    elif not names and (not start or start.startswith(b"pk")):
        kinds = ["incomplete; download or copy it again"]
    if kinds:
        return f"it is {kinds[0]}"
    if found := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        is_model = re.search(r"models?\.|\bnn\.|Net\b|Module\b", found[1])
        objects = f"{'a complete pickled model' if is_model else 'Python objects'}, {found[1]}"
        return f"it holds {objects}; no code in it was executed: {SAVE_TENSORS}"
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(". ")[0]
    problem = f"it is not a file of torch.save or safetensors ({reason or type(error).__name__})"
    return f"{problem}; no code in it was executed: take another checkpoint"


def _flatten(held: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested mappings with their keys, joined by dots."""
    if isinstance(held, Mapping) and depth < 8:  # a mapping may contain itself
        for key, value in held.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            elif isinstance(key, str):
                yield from _flatten(value, f"{prefix}{key}.", depth + 1)


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
