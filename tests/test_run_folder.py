import json
import os
from pathlib import Path

import pytest

from resnet_in1k.errors import UserError
from resnet_in1k.run_folder import RunFolder, describe_data, find_run, read_recipe, write_recipe
from resnet_in1k.sources import open_train_and_val


@pytest.fixture
def run(tmp_path: Path, tiny) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    write_recipe(run, "tiny", tiny, {"source": "digits"}, world_size=2)
    return run


def test_the_recipe_comes_back(run: RunFolder, tiny):
    recipe, facts = read_recipe(run)
    assert recipe == tiny
    assert (facts["recipe"]["name"], facts["data"]["source"], facts["world_size"]) == ("tiny", "digits", 2)


def test_an_existing_run_is_refused_unless_resumed(run: RunFolder):
    with pytest.raises(UserError, match="already holds a run; go on with it by --resume, or choose another"):
        run.check_free(resume=False)
    run.check_free(resume=True)
    RunFolder(run.path.parent).check_free(resume=False)


def test_checkpoints_of_nobody_knows_what_are_refused(run: RunFolder):
    (run.checkpoints / "step_00000004").mkdir()
    run.recipe.unlink()
    for resume in (False, True):
        with pytest.raises(UserError, match=r"has checkpoints, but no recipe.json to say of what data and recipe; put"):
            run.check_free(resume=resume)


def test_an_output_folder_that_cannot_be_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        RunFolder(tmp_path / "file").check_free(resume=False)
    with pytest.raises(UserError, match="cannot be written to: Not a directory"):
        RunFolder(tmp_path / "file/run").create()


def test_a_line_that_cannot_be_added_leaves_no_half(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    run.append({"kind": "train", "step": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left") as error:
        run.append({"kind": "train", "step": 2})
    assert error.value.filename == str(run.log)
    assert [record["step"] for record in run.records()] == [1]


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "train"}', '{"kind": "other", "step": 1}'])
def test_a_line_that_is_none_of_ours_is_named(run: RunFolder, line: str):
    run.log.write_text(line + "\n")
    with pytest.raises(UserError, match=r"log.jsonl cannot be read"):
        run.records()


def test_records_after_a_step_are_forgotten(run: RunFolder):
    records = [{"kind": "train", "step": step, "loss": step / 3} for step in (10, 20, 30)]
    for record in records:
        run.append(record)
    with run.log.open("a") as file:
        file.write('{"kind": "tra')  # cut off by a kill
    assert run.records() == records
    run.forget_after(20)
    run.append(records[2])
    assert [json.loads(line) for line in run.log.read_text().splitlines()] == records


def test_the_run_is_found_from_what_lies_in_it(run: RunFolder):
    step = run.checkpoints / "step_00000001"
    step.mkdir()
    (step / "model.safetensors").touch()
    for checkpoint in (run.path, step, step / "model.safetensors", run.path / "model.safetensors"):
        found = find_run(checkpoint)
        assert found is not None
        assert found.path.resolve() == run.path.resolve()
    assert find_run(run.path.parent / "elsewhere.safetensors") is None


@pytest.mark.parametrize("text", ["", "{}", '{"recipe": {"lr": 3}}', "\x00"])
def test_an_unreadable_recipe_is_named(run: RunFolder, text: str):
    run.recipe.write_text(text)
    with pytest.raises(UserError, match=r"recipe.json cannot be read as a run's recipe"):
        read_recipe(run)


def test_data_is_described_by_counts_names_and_fingerprint(image_folder: Path):
    facts = describe_data(*open_train_and_val(str(image_folder)))
    assert (facts["num_train_images"], facts["num_val_images"]) == (37, 12)
    assert facts["class_names"] == ["ant", "bee", "cat", "dog", "eel", "fox"]
    assert facts["fingerprint"]["train"] != facts["fingerprint"]["val"]
