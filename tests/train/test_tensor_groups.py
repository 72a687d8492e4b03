"""Any optimizer and any group of tensors: saved, loaded into fresh ones, continued as if never interrupted."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.small_network import SmallNetwork, all_tensors, assert_same_tensors, groups_of, take_steps
from safetensors.torch import load_file
from timm.optim import Lamb
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_in1k.train.checkpoint import (
    ModelGroup,
    OptimizerGroup,
    TensorGroup,
    TrainState,
    load_checkpoint,
    save_checkpoint,
)
from resnet_in1k.utils.errors import UserError

Parameters = list[torch.nn.Parameter]


class CountingSGD(torch.optim.SGD):
    """Counts its steps by Python numbers: in a group, in one of its defaults, in a parameter's state; as schedule-free
    optimizers and older ones do. Its learning rate depends on all three."""

    def __init__(self, parameters: Parameters, lr: float):
        super().__init__(parameters, lr, momentum=0.9)
        self.defaults["weight_sum"] = 0.0
        for group in self.param_groups:
            group["weight_sum"] = 0.0

    def step(self) -> None:
        for group in self.param_groups:
            group["counted"] = group.get("counted", 0) + 1
            group["weight_sum"] += 1 / 3
            for parameter in group["params"]:
                state = self.state[parameter]
                state["steps"] = state.get("steps", 0) + 1
                parameter.grad *= 1 / (group["counted"] + group["weight_sum"] + state["steps"])
        super().step()


OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "SGD without momentum": lambda parameters: torch.optim.SGD(parameters, 0.01),
    "SGD, fused": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, 0.01, fused=True),
    "RAdam": lambda parameters: torch.optim.RAdam(parameters, 0.01),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, 0.01),  # a scalar for each parameter
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, 0.01),  # factors smaller than their parameter
    "LAMB": lambda parameters: Lamb(parameters, 0.01),  # counts its steps in its groups
    "counting by numbers": lambda parameters: CountingSGD(parameters, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_resumed_bit_identically(tmp_path: Path, name: str):
    """With two parameter groups; the fresh network has other weights before its checkpoint is loaded."""

    def started(seed: int) -> tuple[SmallNetwork, torch.optim.Optimizer, dict[str, TensorGroup]]:
        torch.manual_seed(seed)
        network = SmallNetwork()
        decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
        optimizer = OPTIMIZERS[name]([{"params": others, "weight_decay": 0.0}, {"params": decayed}])
        return network, optimizer, groups_of(network, optimizer)

    network, optimizer, groups = started(0)
    take_steps(network, optimizer, 1, 2, 3)
    tensors = {group: groups[group].tensors() for group in groups}
    folder = save_checkpoint(tmp_path, TrainState(step=3), tensors)
    take_steps(network, optimizer, 4, 5, 6)

    resumed, fresh_optimizer, resumed_groups = started(1)
    load_checkpoint(folder, resumed_groups, "")
    assert_same_tensors(
        {f"{group}/{key}": tensors[group][key] for group in tensors for key in tensors[group]},
        all_tensors(resumed_groups),
    )
    take_steps(resumed, fresh_optimizer, 4, 5, 6)
    assert_same_tensors(all_tensors(resumed_groups), all_tensors(groups))
    for ours, theirs in zip(resumed.parameters(), network.parameters(), strict=True):
        states = (fresh_optimizer.state[ours], optimizer.state[theirs])
        layouts = [{key: value.stride() for key, value in state.items() if torch.is_tensor(value)} for state in states]
        assert layouts[0] == layouts[1]


def test_numbers_of_a_group_are_saved_as_tensors_marked_as_numbers():
    network = SmallNetwork()
    optimizer = CountingSGD(list(network.parameters()), 0.01)
    take_steps(network, optimizer, 1, 2)
    tensors = OptimizerGroup(network, optimizer).tensors()
    numbers = {name: tensor.item() for name, tensor in tensors.items() if name.endswith(":number")}
    counts = {f"{name}.steps:number": 2 for name, _ in network.named_parameters()}
    assert numbers == {**counts, "param_groups.0.counted:number": 2, "param_groups.0.weight_sum:number": 2 / 3}


def test_state_is_named_by_the_parameter_and_the_optimizers_own_name():
    network = SmallNetwork()
    optimizer = Lamb(network.parameters(), 0.01)
    take_steps(network, optimizer, 1, 2)
    optimizer.param_groups[0]["lr"] = 0.02  # set anew at each step, and so not saved
    tensors = OptimizerGroup(network, optimizer).tensors()
    names = [name for name, _ in network.named_parameters()]
    moments = {f"{name}.{moment}" for name in names for moment in ("exp_avg", "exp_avg_sq")}
    assert tensors.keys() == {*moments, "param_groups.0.step"}
    assert tensors["param_groups.0.step"].item() == 2
    assert tensors["conv1.weight.exp_avg"].is_contiguous()
    assert not optimizer.state[network.conv1.weight]["exp_avg"].is_contiguous()  # it is in channels_last


def test_an_optimizer_whose_only_step_was_skipped_has_no_state(tmp_path: Path):
    """As by a loss scaler after an overflow; its own state is resumed with the run."""
    network = SmallNetwork()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    groups, scaler = groups_of(network, optimizer), torch.amp.GradScaler("cpu")
    scaler.scale(network(torch.full((4, 3, 8, 8), torch.inf)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    state = TrainState(step=1, grad_scaler=scaler.state_dict())
    folder = save_checkpoint(tmp_path, state, {name: group.tensors() for name, group in groups.items()})
    assert load_file(folder / "optimizer.safetensors") == {}
    assert load_checkpoint(folder, groups, "") == state


def test_state_of_an_unknown_parameter_is_refused(tmp_path: Path):
    network = SmallNetwork()
    group = OptimizerGroup(network, torch.optim.SGD(network.parameters(), 0.01))
    for name in ("fc.other.momentum_buffer", "momentum_buffer", "param_groups.1.step:number"):
        with pytest.raises(UserError, match=rf"optimizer.safetensors does not fit the model: it has {name}"):
            group.check({name: torch.zeros(3)}, tmp_path / "optimizer.safetensors")


def test_a_third_group_of_tensors_has_its_own_file_and_sum(tmp_path: Path):
    """An exponential moving average of the weights, as torch has it."""

    def started(seed: int) -> tuple[SmallNetwork, torch.optim.Optimizer, AveragedModel, dict[str, TensorGroup]]:
        torch.manual_seed(seed)
        network = SmallNetwork()
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        return network, optimizer, average, groups_of(network, optimizer, ema=ModelGroup(average.module))

    network, optimizer, average, groups = started(0)
    for step in (1, 2, 3):
        take_steps(network, optimizer, step)
        average.update_parameters(network)
    folder = save_checkpoint(tmp_path, TrainState(step=3), {name: group.tensors() for name, group in groups.items()})
    sums = json.loads((folder / "state.json").read_text())["sha256"]
    assert sums.keys() == {"model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"}
    assert sums["ema.safetensors"] == hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()
    assert not torch.equal(*(load_file(folder / f"{name}.safetensors")["fc.weight"] for name in ("model", "ema")))

    *_, fresh_groups = started(1)
    load_checkpoint(folder, fresh_groups, "")
    assert_same_tensors(all_tensors(fresh_groups), all_tensors(groups))

    network, optimizer, _, fresh_groups = started(2)
    before = all_tensors(fresh_groups)
    with pytest.raises(UserError, match=r"the run and this checkpoint differ in ema\.safetensors"):
        load_checkpoint(folder, groups_of(network, optimizer), "")
    data = bytearray((folder / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"ema\.safetensors is damaged: its sha256 is not the recorded one"):
        load_checkpoint(folder, fresh_groups, "")
    assert_same_tensors(all_tensors(fresh_groups), before)
