"""What the main process writes to a run folder; whole runs are in tests/train."""

import json
from pathlib import Path

import pytest
import torch
from helpers.small_network import SmallNetwork, groups_of

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.train.checkpoint import TensorGroup, TrainState, list_checkpoints
from resnet_in1k.train.writer import RunWriter
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def writer(folder: RunFolder) -> RunWriter:
    writer = RunWriter(folder, Launch(), keep_checkpoints=2)
    writer.acquire_lock()
    return writer


@pytest.fixture
def groups() -> dict[str, TensorGroup]:
    network = SmallNetwork()
    return groups_of(network, torch.optim.SGD(network.parameters(), 0.01))


def test_what_a_killed_run_left_incomplete_is_removed(folder: RunFolder):
    folder.create()
    for path in (
        folder.checkpoints / "step_00000001",
        folder.checkpoints / ".step_00000002.77.tmp",
        folder.path / ".temporary.abc",
    ):
        path.mkdir()
        (path / "model.safetensors").write_text("")
        (path / ".state.json.77.tmp").write_text("{")
    (folder.path / ".eval.json.77.tmp").write_text("{")
    RunWriter(folder, Launch(), keep_checkpoints=2).acquire_lock()
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "checkpoints"]
    assert [str(path.relative_to(folder.checkpoints)) for path in sorted(folder.checkpoints.rglob("*"))] == [
        "step_00000001",
        "step_00000001/model.safetensors",
    ]


def test_weights_that_are_not_finite_are_not_saved(folder: RunFolder, writer: RunWriter):
    network = SmallNetwork()
    network.bn1.running_var[3] = torch.inf
    groups = groups_of(network, torch.optim.SGD(network.parameters(), 0.01))
    with pytest.raises(UserError, match=r"after step 1,000 bn1.running_var is not finite and was not saved; try a"):
        writer.save_checkpoint(TrainState(step=1000), groups)
    assert not list(folder.checkpoints.iterdir())


def test_old_checkpoints_are_deleted_but_for_the_best(folder: RunFolder, writer: RunWriter, groups):
    for step in (1, 2, 3, 4):
        writer.save_checkpoint(TrainState(step=step, best_step=min(step, 2)), groups)
    assert [step for step, _ in list_checkpoints(folder.checkpoints)] == [2, 3, 4]


def test_the_start_of_a_run_is_recorded_and_each_resume_added(folder: RunFolder, writer: RunWriter, tiny: Recipe):
    facts = {"data": {"source": "digits"}, "facts": {"world_size": 2}, "evaluation_pending": False}
    writer.start(TrainState(), "tiny", tiny, **facts)
    recipe, written = read_recipe(folder)
    assert (recipe, written["world_size"], "resumed" in written) == (tiny, 2, False)
    for step in (1, 2, 3):
        writer.append({"kind": "train", "step": step})
    writer.start(TrainState(step=2), "tiny", tiny, **{**facts, "facts": {"world_size": 4}})
    assert read_recipe(folder)[1]["resumed"] == [{"after_step": 2, "world_size": 4}]
    assert [json.loads(line)["step"] for line in folder.log.read_text().splitlines()] == [1, 2]


def test_a_list_is_written_only_if_it_has_lines_or_had_some(folder: RunFolder, writer: RunWriter):
    writer.write_list(folder.bad_images, [])
    assert not folder.bad_images.exists()
    writer.write_list(folder.bad_images, ["a", "b"])
    assert folder.bad_images.read_text() == "a\nb\n"
    writer.write_list(folder.bad_images, [])
    assert folder.bad_images.read_text() == ""
