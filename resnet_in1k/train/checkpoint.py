"""Checkpoints: everything that a run needs to be resumed, without pickle, whole or not there at all.

`step_00000123/` holds one safetensors file for each group of tensors (model, optimizer) and `state.json`. Nothing
random has a state and the learning rate is a function of the step, so that is all.
"""

import hashlib
import json
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from resnet_in1k.model.weights import STATE_NAME, check_fits, contiguous_copy, weights_to_save, write_tensors
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError

FORMAT_VERSION = 4
_STEP_FOLDER = re.compile(r"step_(\d+)")


@dataclass
class TrainState:
    """The position in a run, and what is kept of the steps before."""

    step: int = 0
    """Optimizer steps done; 0 before the first."""
    epoch_losses: list[float] = field(default_factory=list)
    """Global mean loss of each step done of an epoch that is not evaluated yet."""
    best_step: int = 0
    """Step of the best weights so far; 0 if none were evaluated."""
    best_top1_accuracy: float = -1.0
    """Their accuracy, as a fraction; below 0 if none were evaluated."""
    best_evaluation: dict[str, Any] | None = None
    """Their eval.json."""
    grad_scaler: dict[str, Any] | None = None
    """The loss scaler's state, with fp16 only."""
    bad_images: list[int] = field(default_factory=list)
    """Indices in the training source of the unreadable images met so far, in order."""
    recipe_sha256: str = ""
    """`Recipe.fingerprint()` of what it was trained by, and from which weights."""


def save_checkpoint(checkpoints: Path, state: TrainState, groups: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write `checkpoints/step_<state.step>/` and return it; `groups` are contiguous CPU tensors, by group and name."""
    folder = checkpoints / f"step_{state.step:08d}"
    with files.new_folder(folder) as temporary:
        sums = {}
        for name, tensors in groups.items():
            file = temporary / f"{name}.safetensors"
            write_tensors(tensors, file)
            sums[file.name] = files.sha256_of(file)
        _write_state(temporary, state, sums)
    return folder


def rewrite_state(checkpoints: Path, state: TrainState) -> None:
    """Replace the state beside the same tensors: what changes in `checkpoints/step_<state.step>/` by its evaluation."""
    folder = checkpoints / f"step_{state.step:08d}"
    _, sums = _read_state(folder)
    _write_state(folder, state, sums)


def _write_state(folder: Path, state: TrainState, sums: Mapping[str, str]) -> None:
    values = {"format_version": FORMAT_VERSION, **asdict(state), "sha256": dict(sums)}
    values["sha256"][STATE_NAME] = state_sha256(values)
    files.write_json(folder / STATE_NAME, values)


def state_sha256(values: Mapping[str, Any]) -> str:
    """Of all values of state.json except this one. With one digit changed, the file would still be valid JSON."""
    sums = {name: value for name, value in values["sha256"].items() if name != STATE_NAME}
    return hashlib.sha256(json.dumps({**values, "sha256": sums}, sort_keys=True).encode()).hexdigest()


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each whole checkpoint, oldest first, in numeric order."""
    if not checkpoints.is_dir():
        return []
    matches = [(match, path) for path in checkpoints.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in matches)


def prune_checkpoints(checkpoints: Path, keep: int, best_step: int, damaged: Container[int] = ()) -> None:
    """Delete all except the `keep` newest and the best; damaged ones are neither deleted nor counted."""
    ours = [(step, folder) for step, folder in list_checkpoints(checkpoints) if step not in damaged]
    for step, folder in ours[:-keep]:
        if step != best_step:
            files.delete_folder(folder)


def load_newest_checkpoint(
    checkpoints: Path, groups: Mapping[str, "TensorGroup"], report: Callable[[str], None], recipe_sha256: str
) -> TrainState | None:
    """Load the newest checkpoint that is whole; report each that is skipped. None if there are no checkpoints.

    Raises:
        UserError: if there are checkpoints, but none that can be loaded: starting anew must be the user's decision.
    """
    folders = [folder for _, folder in reversed(list_checkpoints(checkpoints))]
    for folder in folders:
        try:
            state = load_checkpoint(folder, groups, recipe_sha256)
        except UserError as error:
            report(f"skipped: {error}")
            continue
        report(f"resuming after step {state.step:,} from {folder}")
        return state
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {checkpoints} can be used, see above; fix that, or start "
            "anew in another --output-dir"
        )
    return None


def load_checkpoint(folder: Path, groups: Mapping[str, "TensorGroup"], recipe_sha256: str) -> TrainState:
    """Load all groups of tensors, after all of them were found whole and fitting.

    Raises:
        UserError: if a file is missing, damaged, or does not fit, or if it was trained by another recipe than that of
            `recipe_sha256`; nothing was loaded then.
    """
    state, sums = _read_state(folder)
    if state.recipe_sha256 != recipe_sha256:
        raise UserError(f"{folder} was trained by another recipe than the one in its run's recipe.json")
    if different := sums.keys() ^ {f"{name}.safetensors" for name in groups}:
        raise UserError(f"{folder}: the run and this checkpoint differ in {', '.join(sorted(different))}")
    loaded = {}
    for name, group in groups.items():
        file = folder / f"{name}.safetensors"
        loaded[name] = _read_tensors(file, sums[file.name])
        group.check(loaded[name], file)
    for name, group in groups.items():
        group.load(loaded[name])
    return state


def _read_tensors(file: Path, recorded_sha256: str) -> dict[str, Tensor]:
    try:
        if files.sha256_of(file) != recorded_sha256:
            raise UserError(f"{file} is damaged: its sha256 is not the recorded one")
        return files.retry_once(lambda: load_file(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file ({error})") from None


def _read_state(folder: Path) -> tuple[TrainState, dict[str, str]]:
    """state.json, and the sha256 of the other files; what its own sum matches was written by `_write_state`."""
    path = folder / STATE_NAME
    try:
        values = files.read_json(path)
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version!r}, this version of resnet-in1k reads {FORMAT_VERSION}; resume "
                "with the version that wrote it, or start anew in another --output-dir"
            )
        intact = state_sha256({"format_version": version, **values}) == values["sha256"].pop(STATE_NAME)
        sums = values.pop("sha256")
        state = TrainState(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read ({reason})") from None
    if not intact:
        raise UserError(f"{path} is damaged: its sha256 is not the recorded one")
    if folder.name != f"step_{state.step:08d}":
        raise UserError(f"{path} is the state after step {state.step}, not that of its folder")
    return state, sums


class TensorGroup(Protocol):
    """One safetensors file of a checkpoint."""

    def tensors(self) -> dict[str, Tensor]:
        """Contiguous, on the CPU, sharing no memory with the run."""
        ...

    def check(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        """Raises UserError, naming `file`, if these tensors cannot be loaded."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, after `check`."""
        ...


class ModelGroup:
    """A model's state dict, with clean keys."""

    def __init__(self, model: torch.nn.Module):
        self._model = model

    def tensors(self) -> dict[str, Tensor]:
        return weights_to_save(self._model)

    def check(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        check_fits(self._model, tensors, file)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(tensors, strict=True)


NUMBER = ":number"
"""Ends the names of tensors that are Python numbers in the optimizer."""


class OptimizerGroup:
    """The state of any torch optimizer, by the names of parameters and the optimizer's own names of its state.

    `layer1.0.conv1.weight.momentum_buffer` is the state of one parameter, `param_groups.0.step:number` a number of a
    parameter group: some optimizers count their steps there.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        """In the order in which the optimizer's state dict numbers them."""
        self._names = [names[parameter] for parameter in self._parameters]

    def tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors.update(_as_tensor(f"{name}.{key}", value))
        for number, group in enumerate(self._optimizer.param_groups):
            for key, value in group.items():
                if key != "lr" and self._is_state(key, value):  # the learning rate is set anew at each step
                    tensors.update(_as_tensor(f"param_groups.{number}.{key}", value))
        return tensors

    def _is_state(self, key: str, value: Any) -> bool:
        """Whether a group's value is not just the one that the recipe gives all groups."""
        defaults = self._optimizer.defaults
        return key not in defaults or (type(value) in (int, float) and value != defaults[key])

    def check(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        known = {*self._names, *(f"param_groups.{number}" for number in range(len(self._optimizer.param_groups)))}
        for name in tensors:
            if name.rpartition(".")[0] not in known:
                raise UserError(f"{file} does not fit the model: it has {name}")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        places = {name: place for place, name in enumerate(self._names)}
        state: dict[int, dict[str, Any]] = {}
        groups = self._optimizer.state_dict()["param_groups"]
        for full_name, tensor in tensors.items():
            name, _, key = full_name.removesuffix(NUMBER).rpartition(".")
            value = tensor.item() if full_name.endswith(NUMBER) else tensor
            if name in places:
                state.setdefault(places[name], {})[key] = _laid_out_as(value, self._parameters[places[name]])
            else:
                groups[int(name.rpartition(".")[2])][key] = value
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def _as_tensor(name: str, value: Any) -> dict[str, Tensor]:
    """{} for what is neither a tensor nor a number."""
    if isinstance(value, Tensor):
        return {name: contiguous_copy(value)}
    if type(value) in (int, float):
        return {name + NUMBER: torch.tensor(value, dtype=torch.int64 if type(value) is int else torch.float64)}
    return {}


def _laid_out_as(value: Any, parameter: Tensor) -> Any:
    """A tensor of the parameter's shape takes its memory layout, as the optimizer would have made it."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
