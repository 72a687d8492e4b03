"""Checkpoints: whole, of this run, or refused with the file's name; nothing in them is executed."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.small_network import SmallNetwork, all_tensors, assert_same_tensors, groups_of, take_steps

from resnet_in1k.model.weights import weights_file
from resnet_in1k.train.checkpoint import (
    TensorGroup,
    TrainState,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    prune_checkpoints,
    rewrite_state,
    save_checkpoint,
    state_sha256,
)
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError

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
    assert load_checkpoint(folder, groups, "5" * 64) == TrainState(**state)


def test_files_have_their_sums_and_are_readable_by_the_group(tmp_path: Path, groups: Groups):
    folder = save(tmp_path, groups)
    values = json.loads((folder / STATE).read_text())
    assert values["format_version"] == 5
    assert values["sha256"].keys() == {MODEL, OPTIMIZER, STATE}
    for name in (MODEL, OPTIMIZER):
        assert values["sha256"][name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    mask = os.umask(0)
    os.umask(mask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in folder.iterdir())


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, groups, step=1)
    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, groups, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_the_state_can_be_rewritten_beside_the_same_tensors(tmp_path: Path, groups: Groups):
    folder = save(tmp_path, groups, epoch_losses=[1.0, 0.5])
    before = {name: (folder / name).read_bytes() for name in (MODEL, OPTIMIZER)}
    evaluated = {"best_step": 2, "best_top1_accuracy": 0.5, "best_evaluation": {"loss": 1.0}}
    rewrite_state(tmp_path, TrainState(step=2, **evaluated))
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert load_checkpoint(folder, groups, "") == TrainState(step=2, **evaluated)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_checkpoints_are_listed_by_number_without_incomplete_ones(tmp_path: Path):
    for name in ("step_00000009", "step_00000010", "step_100000000", ".step_00000011.7.tmp", "notes"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 100_000_000]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    for step in (1, 2, 3, 4, 5, 9):
        (tmp_path / f"step_{step:08d}").mkdir()
    prune_checkpoints(tmp_path, keep=2, best_step=2, damaged={4, 9})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3, 4, 5, 9]
    assert not list(tmp_path.glob(".*"))


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def flip_bit(name: str, place: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1
        (folder / name).write_bytes(data)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace_in_state(old: str, new: str) -> Callable[[Path], None]:
    """Still valid JSON."""

    def damage(folder: Path) -> None:
        text = (folder / STATE).read_text()
        assert text.count(old) == 1
        (folder / STATE).write_text(text.replace(old, new))

    return damage


def write_state(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / STATE).write_bytes(data)


def forge(name: str, data: bytes) -> Callable[[Path], None]:
    """Replace a file and its sums, as somebody could who wants a run to load it."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)
        state = json.loads((folder / STATE).read_text())
        state["sha256"][name] = hashlib.sha256(data).hexdigest()
        state["sha256"][STATE] = state_sha256(state)
        (folder / STATE).write_text(json.dumps(state))

    return damage


MALFORMED = {
    "without weights": (remove(MODEL), f"{MODEL} cannot be read .No such file"),
    "without an optimizer": (remove(OPTIMIZER), f"{OPTIMIZER} cannot be read .No such file"),
    "without a state": (remove(STATE), f"{STATE} cannot be read .No such file"),
    "weights empty": (truncate(MODEL, 0), f"{MODEL} is damaged"),
    "weights a byte short": (truncate(MODEL, 0.9999), f"{MODEL} is damaged"),
    "optimizer cut in the middle": (truncate(OPTIMIZER, 0.5), f"{OPTIMIZER} is damaged"),
    "state cut in the middle": (truncate(STATE, 0.5), f"{STATE} cannot be read .JSONDecodeError"),
    "state empty": (truncate(STATE, 0), f"{STATE} cannot be read .JSONDecodeError"),
    "a bit of the weights' header": (flip_bit(MODEL, 20), f"{MODEL} is damaged"),
    "a bit of the weights": (flip_bit(MODEL, -1), f"{MODEL} is damaged"),
    "a bit of the momentum": (flip_bit(OPTIMIZER, -1), f"{OPTIMIZER} is damaged"),
    "a digit of the state": (
        replace_in_state('"best_top1_accuracy": -1.0', '"best_top1_accuracy": -3.0'),
        f"{STATE} is damaged",
    ),
    "a key of the state": (replace_in_state('"bad_images"', '"bad_imagez"'), f"{STATE} cannot be read .TypeError"),
    "state of the version before": (
        replace_in_state('"format_version": 5', '"format_version": 4'),
        "has format version 4, and this version of resnet-in1k reads 5; resume with the version that wrote it",
    ),
    "state without a version": (replace_in_state('"format_version": 5,', ""), f"{STATE} cannot be read .KeyError"),
    "state that is a list": (write_state(b"[]"), f"{STATE} cannot be read .TypeError"),
    "state that is no text": (write_state(b"\xff\xfe\x00"), f"{STATE} cannot be read .UnicodeDecodeError"),
    "state nested too deeply": (write_state(b"[" * 100_000), f"{STATE} cannot be read .ValueError: nested too deeply"),
    "forged weights with a huge header": (
        forge(MODEL, (1 << 60).to_bytes(8, "little") + b"{}"),
        f"{MODEL} is not a complete safetensors file",
    ),
    "forged optimizer with a header that is no JSON": (
        forge(OPTIMIZER, (4).to_bytes(8, "little") + b"\xff\xfe{}"),
        f"{OPTIMIZER} is not a complete safetensors file",
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
        ("recipe", "was trained by another recipe than the one in its run's recipe.json"),
        ("network", r"model.safetensors does not fit a SmallNetwork: different shape of fc.weight, fc.bias"),
        ("group", r"the run and this checkpoint differ in optimizer.safetensors"),
    ],
)
def test_a_whole_checkpoint_of_something_else_is_refused_and_changes_nothing(
    tmp_path: Path, groups: Groups, another: str, message: str
):
    ours = {"model": groups["model"]} if another == "group" else groups
    folder = save(tmp_path, trained_groups(num_classes=4) if another == "network" else groups)
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
    with pytest.raises(UserError, match=f"{MODEL} is not a complete safetensors file"):
        load_checkpoint(folder, groups, "")
    assert not (tmp_path / "executed").exists()


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, groups: Groups):
    save(tmp_path, groups, step=1)
    flip_bit(MODEL, -1)(save(tmp_path, groups, step=2))
    lines: list[str] = []
    assert load_newest_checkpoint(tmp_path, groups, lines.append, "").step == 1
    assert len(lines) == 2
    assert lines[0].startswith("skipped: ")
    assert "step_00000002/model.safetensors is damaged" in lines[0]
    assert lines[1].startswith("resuming after step 1 from ")


def test_without_a_usable_checkpoint_a_run_is_not_started_anew(tmp_path: Path, groups: Groups):
    assert load_newest_checkpoint(tmp_path, groups, print, "") is None
    remove(STATE)(save(tmp_path, groups))
    with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* can be used, see above; fix that, or start"):
        load_newest_checkpoint(tmp_path, groups, print, "")


def test_damaged_weights_are_refused_by_evaluation_and_publication_too(tmp_path: Path, groups: Groups):
    """Which read the weights alone, through `weights_file`."""
    folder = save(tmp_path, groups)
    assert weights_file(folder) == folder / MODEL
    flip_bit(MODEL, -1)(folder)
    for checkpoint in (folder, folder / MODEL):
        with pytest.raises(UserError, match=r"step_00000002/model.safetensors is damaged: its sha256 is not"):
            weights_file(checkpoint)
    (folder / STATE).write_text("{")
    with pytest.raises(UserError, match=r"its sha256 in .*state.json cannot be read \(JSONDecodeError"):
        weights_file(folder)
