"""Step folders: everything that a run needs to go on, without pickle, whole or not there at all.

`step_00000123/` holds `model.safetensors`, `optimizer.safetensors` and `state.json`. Nothing random has a state and the
learning rate is a function of the step, so that is all.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from resnet_in1k import files
from resnet_in1k.errors import UserError
from resnet_in1k.model import STATE_NAME, WEIGHTS_NAME, load_strictly, read_weights

FORMAT_VERSION = 3
FORMAT_VERSION_WITHOUT_SUM = 2
"""Is read, too: state.json had no sum of its own."""
OPTIMIZER_NAME = "optimizer.safetensors"
_STEP_FOLDER = re.compile(r"step_(\d+)")


@dataclass
class TrainState:
    """The position in a run, and what is remembered of the way there."""

    step: int = 0
    """Optimizer steps done; 0 before the first."""
    epoch_losses: list[float] = field(default_factory=list)
    """Global mean loss of each step done of an epoch that is not over."""
    best_step: int = 0
    """Step of the best weights so far; 0 if none were evaluated."""
    best_top1_accuracy: float = -1.0
    """Their accuracy, as a fraction; below 0 if none were evaluated."""
    best_evaluation: dict[str, Any] | None = None
    """Their eval.json."""
    grad_scaler: dict[str, Any] | None = None
    """The loss scaler's state, with fp16 only."""
    bad_images: list[int] = field(default_factory=list)
    """Places in the training source of the images met so far that cannot be read, in order."""
    recipe_sha256: str = ""
    """`Recipe.fingerprint()` of what it was trained by."""


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Contiguous CPU tensors to safetensors, atomically; the same weights give the same bytes."""
    files.write_atomically(path, lambda temporary: _save_tensors(state, temporary))


def save_checkpoint(
    checkpoints: Path, state: TrainState, weights: Mapping[str, Tensor], optimizer_tensors: Mapping[str, Tensor]
) -> Path:
    """Write `checkpoints/step_<state.step>/` and return it."""
    folder = checkpoints / f"step_{state.step:08d}"
    with files.new_folder(folder) as temporary:
        _save_tensors(weights, temporary / WEIGHTS_NAME)
        _save_tensors(optimizer_tensors, temporary / OPTIMIZER_NAME)
        sums = {name: files.sha256_of(temporary / name) for name in (WEIGHTS_NAME, OPTIMIZER_NAME)}
        _write_state(temporary, state, sums)
    return folder


def save_state_anew(checkpoints: Path, state: TrainState) -> None:
    """Another state beside the same tensors: what changes in `checkpoints/step_<state.step>/` by its evaluation."""
    folder = checkpoints / f"step_{state.step:08d}"
    _, sums = _read_state(folder)
    with files.new_folder(folder) as temporary:
        for name in sums:
            files.link_or_copy(folder / name, temporary / name)
        _write_state(temporary, state, sums)


def _write_state(folder: Path, state: TrainState, sums: Mapping[str, str]) -> None:
    values = {"format_version": FORMAT_VERSION, **asdict(state), "sha256": dict(sums)}
    values["sha256"][STATE_NAME] = state_sha256(values)
    files.write_json(folder / STATE_NAME, values)


def state_sha256(values: Mapping[str, Any]) -> str:
    """Of what state.json says but for this very sum, however it is laid out: one digit amiss is still JSON."""
    sums = {name: value for name, value in values["sha256"].items() if name != STATE_NAME}
    return hashlib.sha256(json.dumps({**values, "sha256": sums}, sort_keys=True).encode()).hexdigest()


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Not safetensors' own save_file: its files are readable by their owner only, whatever the umask says.
    path.write_bytes(save(dict(tensors), metadata={"format": "pt"}))


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each whole checkpoint, oldest first, in numeric order."""
    if not checkpoints.is_dir():
        return []
    matches = [(match, path) for path in checkpoints.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in matches)


def recover_checkpoints(checkpoints: Path) -> None:
    """Clear away what a killed run left half done. To be called by the run that holds the lock only."""
    for folder, step in files.set_aside(checkpoints):
        if step.exists():
            shutil.rmtree(folder)
        else:  # killed between the two renames of a step saved again
            folder.rename(step)
    files.remove_temporaries(checkpoints)


def prune_checkpoints(checkpoints: Path, keep: int, best_step: int, passed_over: Container[int] = ()) -> None:
    """Delete all but the `keep` newest and the best; what was passed over as damaged neither goes nor counts."""
    ours = [(step, folder) for step, folder in list_checkpoints(checkpoints) if step not in passed_over]
    for step, folder in ours[:-keep]:
        if step != best_step:
            files.delete_folder(folder)


def load_newest_checkpoint(
    checkpoints: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
    recipe_sha256: str = "",
) -> TrainState | None:
    """Go back to the newest checkpoint that is whole; tell of each that is passed over. None if there is none at all.

    Raises:
        UserError: if there are checkpoints, but not one that can be used: to start afresh must be the user's decision.
    """
    folders = [folder for _, folder in reversed(list_checkpoints(checkpoints))]
    for folder in folders:
        try:
            state = load_checkpoint(folder, model, optimizer, recipe_sha256)
        except UserError as error:
            say(f"passed over: {error}")
            continue
        say(f"resuming after step {state.step:,} from {folder}")
        return state
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {checkpoints} can be used, as said above; mend that, or start "
            "afresh in another --output-dir"
        )
    return None


def load_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe_sha256: str = ""
) -> TrainState:
    """Put weights and optimizer tensors back in place, after all of them were found whole and fitting.

    Raises:
        UserError: if a file is missing, damaged, or does not fit the model, or if it was trained by another recipe than
            that of `recipe_sha256`; nothing was changed then.
    """
    state, sums = _read_state(folder)
    if state.recipe_sha256 != recipe_sha256:
        raise UserError(f"{folder} was trained by another recipe than the one in its run's recipe.json")
    for name in (WEIGHTS_NAME, OPTIMIZER_NAME):
        try:
            actual = files.sha256_of(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error.strerror})") from None
        if actual != sums.get(name):
            raise UserError(f"{folder / name} is damaged: its sha256 is not the recorded one")
    weights = read_weights(folder / WEIGHTS_NAME)
    try:
        tensors = files.twice_if_need_be(lambda: load_file(folder / OPTIMIZER_NAME))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / OPTIMIZER_NAME} is not a whole safetensors file ({error})") from None
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter = parameters.get(name.rpartition(".")[0])
        if parameter is None or parameter.shape != tensor.shape or parameter.dtype != tensor.dtype:
            raise UserError(f"{folder / OPTIMIZER_NAME} does not fit the model: {name}, {tuple(tensor.shape)}")
    missing = parameters.keys() - {name.rpartition(".")[0] for name in tensors}
    # SGD without momentum has no tensors, and none has any whose steps so far a loss scaler has skipped.
    may_be_empty = state.step == 0 or not optimizer.defaults["momentum"] or state.grad_scaler is not None
    if missing and (tensors or not may_be_empty):
        raise UserError(f"{folder / OPTIMIZER_NAME} lacks {min(missing)}.momentum_buffer")
    load_strictly(model, weights, folder / WEIGHTS_NAME)
    load_optimizer_tensors(model, optimizer, tensors)
    return state


def _read_state(folder: Path) -> tuple[TrainState, dict[str, str]]:
    """state.json, each value of the type and range that it must have; and the sha256 of the other files."""
    path = folder / STATE_NAME
    try:
        values = json.loads(files.read_text(path), parse_constant=_refuse)
        version = values["format_version"]
        actual = "" if version == FORMAT_VERSION_WITHOUT_SUM else state_sha256(values)
        del values["format_version"]
        sums = values.pop("sha256")
        recorded = sums.pop(STATE_NAME, "")
        state = TrainState(**values)
        sound = state.step == int(folder.name.removeprefix("step_")) and _is_sound(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read ({reason})") from None
    if version not in (FORMAT_VERSION_WITHOUT_SUM, FORMAT_VERSION):
        raise UserError(f"{path} has format version {version!r}; this version of resnet_in1k reads {FORMAT_VERSION}")
    if actual != recorded:
        raise UserError(f"{path} is damaged: its sha256 is not the recorded one")
    if not sound:
        raise UserError(f"{path} does not describe a training after step {folder.name.removeprefix('step_')}")
    return state, sums


def _refuse(constant: str) -> None:
    """Raises ValueError: NaN and infinities are not JSON, and nothing in a state may be one."""
    raise ValueError(f"{constant} in it")


SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def _is_sound(state: TrainState) -> bool:
    """Each value of the type and range that it must have."""
    return (
        type(state.step) is type(state.best_step) is int
        and 0 <= state.best_step <= state.step
        and isinstance(state.epoch_losses, list)
        and len(state.epoch_losses) <= state.step
        and all(isinstance(loss, float) and math.isfinite(loss) for loss in state.epoch_losses)
        and isinstance(state.best_top1_accuracy, float)
        and math.isfinite(state.best_top1_accuracy)
        and (state.best_evaluation is None) == (state.best_step == 0)
        and (state.best_evaluation is None or isinstance(state.best_evaluation["weights_sha256"], str))
        and (state.grad_scaler is None or state.grad_scaler.keys() == SCALER_KEYS)
        and all(type(value) in (int, float) for value in (state.grad_scaler or {}).values())
        and isinstance(state.recipe_sha256, str)
        and isinstance(state.bad_images, list)
        and all(type(index) is int and index >= 0 for index in state.bad_images)
    )


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter: `layer1.0.conv1.weight.momentum_buffer`; contiguous, on the CPU."""
    return {
        f"{name}.{key}": torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
        if isinstance(tensor, Tensor)
    }


def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; each tensor takes its parameter's device and memory layout."""
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        optimizer.state[parameters[name]][key] = torch.empty_like(parameters[name]).copy_(tensor)
