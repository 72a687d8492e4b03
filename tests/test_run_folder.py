"""The layout of a run folder, and its log."""

import json
from pathlib import Path

import pytest

from resnet_in1k.run_folder import RunFolder, find_run
from resnet_in1k.utils.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.recipe.write_text("{}")
    return run


def test_an_existing_run_is_refused_unless_resumed(run: RunFolder):
    with pytest.raises(UserError, match="already contains a run; continue it with --resume, or choose another"):
        run.check_free(resume=False)
    run.check_free(resume=True)
    RunFolder(run.path.parent).check_free(resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_without_a_recipe_are_refused(run: RunFolder, resume: bool):
    (run.checkpoints / "step_00000004").mkdir()
    run.recipe.unlink()
    with pytest.raises(
        UserError, match=r"has checkpoints, but no recipe.json with their recipe and data; restore that"
    ):
        run.check_free(resume)


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        RunFolder(tmp_path / "file").check_free(resume=False)
    with pytest.raises(UserError, match="cannot be written to: Not a directory"):
        RunFolder(tmp_path / "file/run").create()


def test_the_nearest_existing_folder_is_where_the_run_would_be_made(run: RunFolder):
    assert run.nearest_existing() == run.path
    assert RunFolder(run.path / "a/b").nearest_existing() == run.path


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "train"}', '{"kind": "other", "step": 1}'])
def test_a_line_of_the_log_that_training_did_not_write_is_an_error(run: RunFolder, line: str):
    run.log.write_text(line + "\n")
    with pytest.raises(UserError, match=r"log.jsonl cannot be read"):
        run.records()


def test_records_after_a_step_are_dropped(run: RunFolder):
    records = [{"kind": "train", "step": step, "loss": step / 3} for step in (10, 20, 30)]
    for record in records:
        run.append(record)
    with run.log.open("a") as file:
        file.write('{"kind": "tra')  # cut off by a kill
    assert run.records() == records
    run.truncate_log(20)
    run.append(records[2])
    assert [json.loads(line) for line in run.log.read_text().splitlines()] == records


@pytest.mark.parametrize(("pending", "kept"), [(True, ["train"]), (False, ["train", "epoch"])])
def test_the_record_of_an_evaluation_that_is_done_again_is_dropped(run: RunFolder, pending: bool, kept: list[str]):
    for kind in ("train", "epoch"):
        run.append({"kind": kind, "step": 20})
    run.truncate_log(20, pending)
    assert [record["kind"] for record in run.records()] == kept


def test_a_run_is_found_from_what_lies_in_it(run: RunFolder):
    step = run.checkpoints / "step_00000001"
    step.mkdir()
    (step / "model.safetensors").touch()
    for checkpoint in (run.path, step, step / "model.safetensors", run.path / "model.safetensors"):
        found = find_run(checkpoint)
        assert found is not None
        assert found.path.resolve() == run.path.resolve()
    assert find_run(run.path.parent / "elsewhere.safetensors") is None
