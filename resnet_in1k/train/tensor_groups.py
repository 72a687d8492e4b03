"""What a checkpoint holds, as named groups of tensors; each knows how its tensors are named, checked and loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from resnet_in1k.model.weights import check_fits, contiguous_copy, weights_to_save
from resnet_in1k.utils.errors import UserError


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
