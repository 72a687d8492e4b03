"""The layout of a run folder, and its log."""

import json
from pathlib import Path

import pytest

from resnet_in1k.run_folder import RunFolder, find_run
from resnet_in1k.utils.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.recipe.write_text("{}")
    return run


def test_a_folder_without_a_run_is_free_and_one_without_its_recipe_is_not(run: RunFolder):
    RunFolder(run.path.parent).check_free(resume=False)
    (run.checkpoints / "step_00000004").mkdir()
    run.recipe.unlink()
    for resume in (False, True):
        with pytest.raises(UserError, match=r"has checkpoints, but no recipe.json with their recipe and data; restore"):
            run.check_free(resume)


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "other", "step": 1}'])
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


def test_a_run_is_found_from_what_lies_in_it(run: RunFolder):
    step = run.checkpoints / "step_00000001"
    step.mkdir()
    (step / "model.safetensors").touch()
    for checkpoint in (run.path, step, step / "model.safetensors", run.path / "model.safetensors"):
        found = find_run(checkpoint)
        assert found is not None
        assert found.path.resolve() == run.path.resolve()
    assert find_run(run.path.parent / "elsewhere.safetensors") is None
