"""The files of a checkpoint: everything that a run needs to be resumed. train/loop.py decides when one is saved.

`step_00000123/` contains one safetensors file for each group of tensors (model, optimizer, ema) and `state.json`. It is
written atomically and without pickle. There is no state of random generators or of the schedule: draws and the learning
rate are functions of the step.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from resnet_in1k.model.weights import STATE_NAME, contiguous_copy, weights_to_save, write_tensors
from resnet_in1k.utils import files
from resnet_in1k.utils.console import print_line
from resnet_in1k.utils.errors import UserError

FORMAT_VERSION = 5
NUMBER = ":number"
"""Name suffix for optimizer values that are Python numbers, not tensors."""


class ModelGroup:
    """The weights and buffers of a model, with clean keys, in one file of a checkpoint."""

    def __init__(self, model: torch.nn.Module):
        self._model = model

    def tensors(self) -> dict[str, Tensor]:
        """Return contiguous copies on the CPU."""
        return weights_to_save(self._model)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(tensors)


class OptimizerGroup:
    """The state of any torch optimizer, by `<parameter name>.<state name>`.

    `layer1.0.conv1.weight.momentum_buffer` is the state of one parameter, `param_groups.0.step:number` a number of a
    parameter group: some optimizers count their steps there.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        names = {parameter: name for name, parameter in model.named_parameters()}
        # In the order in which the optimizer's state dict numbers the parameters.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._parameters = {names[parameter]: parameter for parameter in parameters}

    def tensors(self) -> dict[str, Tensor]:
        values: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                values[f"{name}.{key}"] = value
        defaults = self._optimizer.defaults
        for number, group in enumerate(self._optimizer.param_groups):
            for key, value in group.items():
                # Skip lr, which is set at each step, and what still equals the optimizer's defaults.
                is_default = key in defaults and (type(value) not in (int, float) or value == defaults[key])
                if key != "lr" and not is_default:
                    values[f"param_groups.{number}.{key}"] = value
        tensors = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[name] = contiguous_copy(value)
            elif type(value) in (int, float):
                tensors[name + NUMBER] = torch.tensor(value, dtype=torch.int64 if type(value) is int else torch.float64)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        indices = {name: index for index, name in enumerate(self._parameters)}
        state: dict[int, dict[str, Any]] = {}
        groups = self._optimizer.state_dict()["param_groups"]
        for full_name, tensor in tensors.items():
            name, _, key = full_name.removesuffix(NUMBER).rpartition(".")
            value: Any = tensor.item() if full_name.endswith(NUMBER) else tensor
            if name not in indices:
                groups[int(name.rpartition(".")[2])][key] = value
                continue
            parameter = self._parameters[name]
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # The memory layout that the optimizer would have given it: channels_last for convolutions.
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            state.setdefault(indices[name], {})[key] = value
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


TensorGroup = ModelGroup | OptimizerGroup


@dataclass
class TrainState:
    """The content of state.json: progress of a run, and everything besides tensors that a resume needs."""

    format_version: int = FORMAT_VERSION
    step: int = 0  # of the newest checkpoint; 0 before the first
    epoch_losses: list[float] = field(default_factory=list)
    """Global mean loss of each step of an epoch that has not been evaluated yet."""
    best_step: int = 0  # of the best weights so far; 0 if none were evaluated
    best_top1_accuracy: float = -1.0  # as a fraction; below 0 if none were evaluated
    best_evaluation: dict[str, Any] | None = None  # its eval.json
    grad_scaler: dict[str, Any] | None = None  # the state of the loss scaler; None except with fp16
    bad_images: list[int] = field(default_factory=list)
    """Sorted indices in the training source of the unreadable images met so far."""
    recipe_sha256: str = ""  # Recipe.fingerprint() of the recipe and the initial weights
    sha256: dict[str, str] = field(default_factory=dict)  # of the tensors' files, by name


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def save_checkpoint(checkpoints: Path, state: TrainState, groups: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write `checkpoints/step_<state.step>/` and return it; `groups` are contiguous CPU tensors, by group and name."""
    folder = checkpoint_folder(checkpoints, state.step)
    with files.replacing(folder) as temporary:
        temporary.mkdir()  # not its parents: a run folder that has vanished is an error
        state.sha256 = {}
        for name, tensors in groups.items():
            file = temporary / f"{name}.safetensors"
            write_tensors(tensors, file)
            state.sha256[file.name] = files.sha256_of(file)
        write_state(temporary, state)
    return folder


def write_state(folder: Path, state: TrainState) -> None:
    """Write state.json, with its own hash, too, which detects changed values that are still valid JSON."""
    values = asdict(state)
    values["sha256"][STATE_NAME] = hash_values(values)
    files.write_json(folder / STATE_NAME, values)


def hash_values(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of each complete checkpoint, oldest first."""
    steps = ((path.name.removeprefix("step_"), path) for path in checkpoints.glob("step_*"))
    return sorted((int(step), path) for step, path in steps if step.isdecimal())


def load_newest_checkpoint(
    checkpoints: Path, groups: Mapping[str, TensorGroup], recipe_sha256: str
) -> TrainState | None:
    """Load the newest intact checkpoint and report each that is skipped. None if there are no checkpoints.

    Raises:
        UserError: if there are checkpoints, but none can be loaded: a restart must be the user's choice.
    """
    folders = [folder for _, folder in reversed(list_checkpoints(checkpoints))]
    for folder in folders:
        try:
            state = load_checkpoint(folder, groups, recipe_sha256)
        except UserError as error:
            print_line(f"skipped: {error}")
            continue
        print_line(f"resuming after step {state.step:,} from {folder}")
        return state
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {checkpoints} can be used, see the messages above; repair one, "
            "or start again in another --output-dir"
        )
    return None


def load_checkpoint(folder: Path, groups: Mapping[str, TensorGroup], recipe_sha256: str) -> TrainState:
    """Load all groups of tensors, after all files have been read. With the same recipe they fit.

    Raises:
        UserError: if a file is missing or damaged, or if it was trained by another recipe; nothing is loaded then.
    """
    state = _read_state(folder)
    if state.recipe_sha256 != recipe_sha256:
        raise UserError(f"{folder} belongs to a run with another recipe or other initial weights")
    if different := state.sha256.keys() ^ {f"{name}.safetensors" for name in groups}:
        raise UserError(f"{folder}: the run and this checkpoint differ in {', '.join(sorted(different))}")
    loaded = {name: _read_tensors(folder / f"{name}.safetensors", state.sha256) for name in groups}
    for name, group in groups.items():
        group.load(loaded[name])
    return state


def _read_state(folder: Path) -> TrainState:
    path = folder / STATE_NAME
    with files.content_errors(path):
        values = files.read_json(path)
        if (version := values["format_version"]) != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version!r}, and this version of resnet-in1k reads {FORMAT_VERSION}; "
                "resume with the version that wrote it, or start again in another --output-dir"
            )
        if values["sha256"].pop(STATE_NAME) != hash_values(values):
            raise UserError(f"{path} is damaged: its sha256 does not match the recorded one")
        state = TrainState(**values)
    if folder.name != checkpoint_folder(folder.parent, state.step).name:
        raise UserError(f"{path} is the state after step {state.step}, not that of its folder")
    return state


def _read_tensors(file: Path, sums: Mapping[str, str]) -> dict[str, Tensor]:
    with files.content_errors(file):
        if sums[file.name] != files.sha256_of(file):
            raise UserError(f"{file} is damaged: its sha256 does not match the recorded one")
        return files.retry_once(lambda: load_file(file))
