"""torchvision's ResNet with the Hub's `from_pretrained`, and the one way to read weights of any origin."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_in1k import files
from resnet_in1k.errors import UserError, first_line
from resnet_in1k.recipes import Architecture

WEIGHTS_NAME = "model.safetensors"
STATE_NAME = "state.json"
"""Beside the weights of a checkpoint, with their sha256."""

LAYOUTS: dict[Architecture, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
"""Kind and number of residual blocks in the four stages (https://arxiv.org/abs/1512.03385, table 1)."""


class ResNet(torchvision.models.ResNet, PyTorchModelHubMixin):
    """torchvision's ResNet: the same modules, keys, initial weights and logits.

    Args:
        architecture: torchvision's name, resnet18 to resnet152.
        num_classes: width of the last layer.
        zero_init_residual: start each residual branch at zero (https://arxiv.org/abs/1706.02677).
    """

    def __init__(
        self, architecture: Architecture = "resnet50", num_classes: int = 1000, zero_init_residual: bool = False
    ):
        block, blocks = LAYOUTS[architecture]
        super().__init__(block, list(blocks), num_classes=num_classes, zero_init_residual=zero_init_residual)
        self.architecture = architecture

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "ResNet":
        """Weights from a run folder, a checkpoint folder, a file, or a repository on the Hub; strict; in eval mode.

        Raises:
            UserError: if a local path holds no weights of a ResNet.
        """
        if Path(pretrained_model_name_or_path).exists():
            return load_model(Path(pretrained_model_name_or_path)).eval()
        return super().from_pretrained(pretrained_model_name_or_path, **{"strict": True, **kwargs})


def load_model(checkpoint: Path) -> ResNet:
    """A ResNet with the weights of `checkpoint`; architecture and number of classes are those of its tensors.

    Raises:
        UserError: if there are no weights, or they are not those of a torchvision ResNet.
    """
    file = weights_file(checkpoint)
    state = read_weights(file)
    model = ResNet(architecture_of(state, file), num_classes=len(state["fc.weight"]))
    load_strictly(model, state, file)
    return model


def weights_file(checkpoint: Path) -> Path:
    """The file that `--ckpt` means: itself, or `model.safetensors` in a run, checkpoint or hub folder.

    Raises:
        UserError: if there is none, or it is not what its checkpoint has recorded.
    """
    if not checkpoint.exists():
        raise UserError(
            f"{checkpoint}: no such file or folder; give a run folder, a checkpoint folder or a weights file"
        )
    if checkpoint.is_file():
        _check_sum(checkpoint)
        return checkpoint
    if not (checkpoint / WEIGHTS_NAME).is_file():
        raise UserError(
            f"{checkpoint}: no {WEIGHTS_NAME} in it; a run folder has one after its first epoch, "
            "and each folder in its checkpoints/ has one"
        )
    _check_sum(checkpoint / WEIGHTS_NAME)
    return checkpoint / WEIGHTS_NAME


def _check_sum(file: Path) -> None:
    """A single flipped bit is still a safetensors file, and only its sum tells."""
    state = file.parent / STATE_NAME
    if file.name != WEIGHTS_NAME or not state.is_file():
        return
    try:
        recorded = json.loads(files.read_text(state))["sha256"][file.name]
        actual = files.sha256_of(file)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} cannot be compared with the sum in its {STATE_NAME} ({type(error).__name__}: {error}); "
            "take another checkpoint"
        ) from None
    if actual != recorded:
        raise UserError(f"{file} is damaged: its sha256 is not the recorded one; take another checkpoint")


def read_weights(file: Path) -> dict[str, Tensor]:
    """State dict with clean keys, on the CPU, from safetensors or from an old `.pth`, which is never unpickled freely.

    Raises:
        UserError: if the file is neither, or damaged.
    """
    try:
        if file.suffix == ".safetensors":
            state = files.twice_if_need_be(lambda: safetensors.torch.load_file(file))
        else:
            state = files.twice_if_need_be(lambda: torch.load(file, map_location="cpu", weights_only=True))
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); take another checkpoint") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # torch's unpickler raises whatever a file leads it to that is none of its own
        raise UserError(f"{file} holds no plain tensors ({first_line(error)}); nothing in it was executed") from None
    for wrapper in ("state_dict", "model"):  # what old training scripts put around the weights
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not (isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{file} is not a state dict, a mapping from names to tensors")
    return clean_keys(state)


def clean_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that DDP (`module.`) and torch.compile (`_orig_mod.`) add, in whatever order they did."""

    def clean(key: str) -> str:
        while key.startswith(("module.", "_orig_mod.")):
            key = key.split(".", 1)[1]
        return key

    return {clean(key): tensor for key, tensor in state.items()}


def weights_to_save(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's state dict as it goes to disk: clean keys, contiguous, on the CPU, sharing no memory with it."""
    return {
        key: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        for key, tensor in clean_keys(model.state_dict()).items()
    }


def load_strictly(model: torch.nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Raises UserError, naming `file` and the first keys or shapes that do not fit."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    misshapen = [key for key in expected if key in state and expected[key].shape != state[key].shape]
    for keys, what in [(missing, "lacks"), (unexpected, "has besides"), (misshapen, "has in another shape")]:
        if keys:
            raise UserError(f"{file} does not fit a {type(model).__name__}: it {what} {', '.join(keys[:3])}")
    model.load_state_dict(state, strict=True)


def architecture_of(state: Mapping[str, Tensor], file: Path) -> Architecture:
    """Which ResNet these tensors are of, told by their names.

    Raises:
        UserError: if they are of none.
    """
    for architecture in LAYOUTS:
        if _keys_of(architecture) == state.keys():
            return architecture
    raise UserError(f"{file} holds no torchvision ResNet: its tensor names are not those of {', '.join(LAYOUTS)}")


@functools.cache
def _keys_of(architecture: Architecture) -> frozenset[str]:
    with torch.device("meta"):  # names only: no memory, no initialisation
        return frozenset(ResNet(architecture).state_dict())
