"""Reading weights of any origin, and writing them with clean keys."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from resnet_in1k.model.foreign_keys import with_torchvision_keys
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

WEIGHTS_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"
"""As other projects' repositories call it where they have no safetensors."""
STATE_NAME = "state.json"
"""Beside the weights of a checkpoint, with their sha256."""
PREFIXES = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before the keys of a state dict."""


def weights_file(checkpoint: Path) -> Path:
    """The file that `--ckpt` means: itself, or `model.safetensors` in a run, checkpoint or hub folder.

    Raises:
        UserError: if there is none, or its sha256 is not the one that its checkpoint recorded.
    """
    if not checkpoint.exists():
        raise UserError(
            f"{checkpoint}: no such file or folder; give a run folder, a checkpoint folder or a weights file"
        )
    file = checkpoint if checkpoint.is_file() else checkpoint / WEIGHTS_NAME
    if not file.is_file() and (checkpoint / PICKLE_NAME).is_file():
        file = checkpoint / PICKLE_NAME
    if not file.is_file():
        raise UserError(
            f"{checkpoint}: no {WEIGHTS_NAME} in it; a run folder has one after its first epoch, "
            "and each folder in its checkpoints/ has one"
        )
    _check_sum(file)
    return file


def _check_sum(file: Path) -> None:
    """A file with a flipped bit is still a valid safetensors file."""
    state = file.parent / STATE_NAME
    if file.name != WEIGHTS_NAME or not state.is_file():
        return
    try:
        recorded = files.read_json(state)["sha256"][file.name]
        actual = files.sha256_of(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be compared with the sha256 in its {STATE_NAME} ({type(error).__name__}: {error}); "
            "take another checkpoint"
        ) from None
    if actual != recorded:
        raise UserError(f"{file} is damaged: its sha256 is not the recorded one; take another checkpoint")


def read_weights(file: Path) -> dict[str, Tensor]:
    """State dict with clean keys, on the CPU, from safetensors or from an old `.pth`, by torch's weights-only reader;
    transformers' names are torchvision's then.

    Raises:
        UserError: if the file is neither, or damaged.
    """
    if file.suffix in (".onnx", ".pt2"):
        raise UserError(f"{file} is an exported network, which evaluate.py takes; here give what it was exported from")
    try:
        if file.suffix == ".safetensors":
            state = files.retry_once(lambda: safetensors.torch.load_file(file))
        else:
            state = files.retry_once(lambda: torch.load(file, map_location="cpu", weights_only=True))
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); take another checkpoint") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # torch's unpickler raises all kinds of errors for files that are not its own
        raise UserError(f"{file} holds no plain tensors ({first_line(error)}); nothing in it was executed") from None
    for wrapper in ("state_dict", "model"):  # what old training scripts put around the weights
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not (isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{file} is not a state dict, a mapping from names to tensors")
    return with_torchvision_keys(clean_keys(state))


def clean_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that DDP and torch.compile add, in whatever order they did."""

    def clean(key: str) -> str:
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        return key

    return {clean(key): tensor for key, tensor in state.items()}


def weights_to_save(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's state dict as it is written: clean keys, contiguous, on the CPU, sharing no memory with it."""
    return {key: contiguous_copy(tensor) for key, tensor in clean_keys(model.state_dict()).items()}


def contiguous_copy(tensor: Tensor) -> Tensor:
    """On the CPU; safetensors takes no channels_last tensors."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Contiguous CPU tensors to safetensors, atomically; the same weights give the same bytes."""
    files.write_atomically(path, lambda temporary: write_tensors(state, temporary))


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Not safetensors' own save_file: its files are readable by their owner only, whatever the umask.
    path.write_bytes(safetensors.torch.save(dict(tensors), metadata={"format": "pt"}))


def load_strictly(model: torch.nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Raises UserError, naming `file` and the first keys or shapes that do not fit."""
    check_fits(model, state, file)
    model.load_state_dict(state, strict=True)


def check_fits(model: torch.nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    misshapen = [key for key in expected if key in state and expected[key].shape != state[key].shape]
    for keys, what in [(missing, "lacks"), (unexpected, "has in addition"), (misshapen, "has in another shape")]:
        if keys:
            raise UserError(f"{file} does not fit a {type(model).__name__}: it {what} {', '.join(keys[:3])}")
