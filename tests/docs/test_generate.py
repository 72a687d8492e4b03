"""The generated pages are those of the code, and the documented keys are those of a run's files."""

import json
from dataclasses import replace
from pathlib import Path

import generate
import pytest
from helpers.processes import ROOT
from helpers.training import TINY, narrow_resnet18, rewind, run


@pytest.mark.slow
def test_generated_pages_are_those_of_the_code():
    for path, text in generate.generated().items():
        assert path.read_text(encoding="utf-8") == text, "run python docs/generate.py"
    assert generate.recipe_rows() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_documented_keys_are_those_of_a_run(image_folder: Path, tmp_path: Path):
    """Every optional key is written: a run has weights to start from, a teacher, an average and a price, is resumed."""
    recipe = replace(TINY, ema_decay=0.9, teacher_weight=0.5)
    with narrow_resnet18():
        first = run(replace(recipe, epochs=1, teacher_weight=0.0), image_folder, tmp_path / "first")
        how = {"init_from": str(first.path), "teacher": str(first.path), "dollars_per_hour": 1.0, "checkpoint_every": 3}
        folder = run(recipe, image_folder, tmp_path / "run", **how)
        run(recipe, image_folder, rewind(folder, step=3).path, resume=True, **how)
    (recorded, evaluation, *_, state) = (
        json.loads(path.read_text())
        for path in (folder.recipe, folder.evaluation, *sorted(folder.checkpoints.glob("step_*/state.json")))
    )
    of_kind = {kind: [each for each in folder.records() if each["kind"] == kind] for kind in ("train", "epoch")}
    written = {"recipe.json": recorded, "eval.json": evaluation, "state.json": state}
    written |= {f"log.jsonl, {kind}": records[-1] for kind, records in of_kind.items()}
    for file, keys in generate.RUN_FOLDER_KEYS.items():
        assert set(written[file]) == set(keys) - {"command"}, file  # this run is not started by a command
