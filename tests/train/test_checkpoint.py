"""Checkpoints: whole, of this run, or refused with the file's name; any optimizer continues as if never interrupted."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.small_network import SmallNetwork, all_tensors, assert_same_tensors, groups_of, take_steps
from timm.optim import Lamb

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.checkpoint import (
    ModelGroup,
    TensorGroup,
    TrainState,
    hash_values,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from resnet_in1k.train.writer import write_checkpoint, write_start
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
Groups = dict[str, TensorGroup]


def trained_groups(num_classes: int = 3) -> Groups:
    """After two steps, so that there is momentum."""
    torch.manual_seed(0)
    network = SmallNetwork(num_classes)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    take_steps(network, optimizer, 1, 2)
    return groups_of(network, optimizer)


@pytest.fixture
def groups() -> Groups:
    return trained_groups()


def save(checkpoints: Path, groups: Groups, **state: object) -> Path:
    tensors = {name: group.tensors() for name, group in groups.items()}
    return save_checkpoint(checkpoints, TrainState(**{"step": 2, **state}), tensors)


def test_all_of_the_state_is_loaded_again(tmp_path: Path, groups: Groups):
    state = {"step": 7, "epoch_losses": [0.1, 1 / 3], "best_step": 5, "best_top1_accuracy": 0.7}
    state |= {"best_evaluation": {"top1_accuracy": 0.7, "weights_sha256": "0" * 64}, "bad_images": [3, 4]}
    state |= {"grad_scaler": {"scale": 65536.0}, "recipe_sha256": "5" * 64}
    folder = save(tmp_path, groups, **state)
    assert folder.name == "step_00000007"
    loaded = load_checkpoint(folder, groups, "5" * 64)
    assert loaded.sha256.keys() == {MODEL, OPTIMIZER}
    assert loaded == TrainState(**state, sha256=loaded.sha256)


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace_in_state(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Still valid JSON."""
    return edit(STATE, lambda data: data.replace(old, new))


def flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def forge(name: str, data: bytes) -> Callable[[Path], None]:
    """Replace a file and its sums, as somebody could who wants a run to load it."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)
        state = json.loads((folder / STATE).read_text())
        state["sha256"][name] = hashlib.sha256(data).hexdigest()
        del state["sha256"][STATE]
        state["sha256"][STATE] = hash_values(state)
        (folder / STATE).write_text(json.dumps(state))

    return damage


MALFORMED = {
    "without weights": (remove(MODEL), f"{MODEL} cannot be read .No such file"),
    "without a state": (remove(STATE), f"{STATE} cannot be read .No such file"),
    "weights a byte short": (edit(MODEL, lambda data: data[:-1]), f"{MODEL} is damaged"),
    "optimizer empty": (edit(OPTIMIZER, lambda data: b""), f"{OPTIMIZER} is damaged"),
    "state cut in the middle": (edit(STATE, lambda data: data[:100]), f"{STATE} cannot be read .JSONDecodeError"),
    "state that is no text": (edit(STATE, lambda data: b"\xff\xfe\x00"), "cannot be read .UnicodeDecodeError"),
    "state nested too deeply": (edit(STATE, lambda data: b"[" * 100_000), "cannot be read .ValueError: nested too"),
    "a bit of the weights": (edit(MODEL, flip_last_bit), f"{MODEL} is damaged"),
    "a bit of the momentum": (edit(OPTIMIZER, flip_last_bit), f"{OPTIMIZER} is damaged"),
    "a digit of the state": (replace_in_state(b'"best_step": 0', b'"best_step": 2'), f"{STATE} is damaged"),
    "a key of the state": (replace_in_state(b'"bad_images"', b'"bad_imagez"'), f"{STATE} is damaged"),
    "state of the version before": (
        replace_in_state(b'"format_version": 5', b'"format_version": 4'),
        "has format version 4, and this version of resnet-in1k reads 5; resume with the version that wrote it",
    ),
    "forged weights with a huge header": (
        forge(MODEL, (1 << 60).to_bytes(8, "little") + b"{}"),
        f"{MODEL} cannot be read .SafetensorError",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_checkpoint_is_refused_by_name_and_changes_nothing(tmp_path: Path, groups: Groups, name: str):
    damage, message = MALFORMED[name]
    folder = save(tmp_path, groups)
    damage(folder)
    before = all_tensors(groups)
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(folder, groups, "")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert_same_tensors(all_tensors(groups), before)


@pytest.mark.parametrize(
    ("another", "message"),
    [
        ("step", "is the state after step 2, not that of its folder"),
        ("recipe", "belongs to a run with another recipe or other initial weights"),
        ("group", r"the run and this checkpoint differ in optimizer.safetensors"),
    ],
)
def test_a_whole_checkpoint_of_something_else_is_refused_and_changes_nothing(
    tmp_path: Path, groups: Groups, another: str, message: str
):
    ours = {"model": groups["model"]} if another == "group" else groups
    folder = save(tmp_path, groups)
    if another == "step":
        folder = folder.rename(tmp_path / "step_00000003")
    before = all_tensors(groups)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder, ours, "0" * 64 if another == "recipe" else "")
    assert_same_tensors(all_tensors(groups), before)


def test_a_pickle_is_not_executed(tmp_path: Path, groups: Groups):
    """One that makes a folder when it is loaded; with valid sums."""
    folder = save(tmp_path, groups)
    forge(MODEL, b"cos\nmkdir\n(V" + str(tmp_path / "executed").encode() + b"\ntR.")(folder)
    with pytest.raises(UserError, match=f"{MODEL} cannot be read .SafetensorError"):
        load_checkpoint(folder, groups, "")
    assert not (tmp_path / "executed").exists()


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


def run_in(folder: Path, groups: Groups) -> SimpleNamespace:
    """As much of a run as its checkpoints need."""
    (folder / "checkpoints").mkdir()
    run = {"folder": RunFolder(folder), "groups": groups, "models": ["model"], "damaged_steps": set()}
    return SimpleNamespace(launch=Launch(), options=SimpleNamespace(keep_checkpoints=2), **run)


def test_the_newest_two_and_the_best_are_kept_and_damaged_ones_neither_deleted_nor_counted(
    tmp_path: Path, groups: Groups, tiny: Recipe
):
    run = run_in(tmp_path, groups)

    def save_after(step: int) -> None:
        run.state = TrainState(step=step, best_step=1)
        write_checkpoint(run)

    for step in (1, 2, 3, 4):
        save_after(step)
    (run.folder.checkpoints / ".step_00000005.7.tmp").mkdir()  # as of a killed run
    assert [step for step, _ in list_checkpoints(run.folder.checkpoints)] == [1, 3, 4]

    run.state, run.recipe_name, run.recipe, run.data_facts, run.facts = TrainState(step=3), "tiny", tiny, {}, {}
    run.started_with = {}
    write_start(run, evaluation_is_pending=False)  # resumed at 3, as 4 is damaged
    save_after(6)
    assert [step for step, _ in list_checkpoints(run.folder.checkpoints)] == [1, 3, 4, 6]
    save_after(100_000_000)
    assert [step for step, _ in list_checkpoints(run.folder.checkpoints)] == [1, 4, 6, 100_000_000]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path):
    network = SmallNetwork()
    network.bn1.running_var[3] = torch.inf
    run = run_in(tmp_path, groups_of(network, torch.optim.SGD(network.parameters(), 0.01)))
    run.groups["ema"] = ModelGroup(SmallNetwork())  # not updated yet
    run.models, run.state = ["model", "ema"], TrainState(step=1000)
    words = r"1,000 bn1.running_var is not finite and was not saved; try a lower --lr in another --output-dir$"
    with pytest.raises(UserError, match=words):
        write_checkpoint(run)
    assert list_checkpoints(run.folder.checkpoints) == []
