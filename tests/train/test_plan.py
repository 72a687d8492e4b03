"""The plan of a run, and the schedule, time and price that a dry run adds."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.training import run

from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train import plan
from resnet_in1k.train.plan import describe_plan, describe_schedule
from resnet_in1k.train.trainer import TrainOptions

TUTORIAL = RECIPES["tutorial"].recipe


def plan_of(recipe: Recipe, image_folder: Path) -> str:
    train, val = open_train_and_val(str(image_folder))
    run = SimpleNamespace(
        recipe_name="tutorial",
        recipe=recipe,
        counts=StepCounts(recipe, num_processes=2, gradient_accumulation_steps=3, num_train_images=len(train)),
        init_from={},
        teacher={},
        train_source=train,
        val_source=val,
        device=torch.device("cpu"),
        accelerator=SimpleNamespace(mixed_precision="bf16"),
        num_workers=1,
        cpu_threads=2,
        options=TrainOptions(compile=True),
    )
    return describe_plan(run)


def test_plan_lists_what_the_run_will_do(image_folder: Path):
    sizes = {"initial_image_size": 128, "image_size_ramp_start": 2, "image_size_ramp_end": 5, "eval_image_size": 256}
    text = plan_of(replace(TUTORIAL, global_batch_size=12, epochs=7, **sizes), image_folder)
    for part in (
        "tutorial, but epochs 20 → 7; global_batch_size 256 → 12",
        "resnet50, 6 classes, 128 px, growing to 224 px, evaluated at 256 px\n",
        "37 training and 12 validation images",
        "12 global = 2 processes × 6 in 3 accumulation steps of 2",
        "3 an epoch (1 image dropped, different images each epoch) × 7 epochs = 21",
        "0.1, then step × 0.2 every 5 epochs",
        "bfloat16 autocast, channels_last, compiled; evaluation in float32",
        "1 loader worker, 2 CPU threads",
    ):
        assert part in text


def rows_of(text: str) -> dict[int, list[str]]:
    return {int(words[0]): words[1:] for line in text.splitlines()[1:] if (words := line.split())}


def test_schedule_shows_rate_and_image_size_at_the_epochs_borders():
    """budget-16 at ten steps an epoch: 1.7 is reached at the end of epoch 2, 192 px from epoch 13 on."""
    schedule = StepCounts(RECIPES["budget-16"].recipe, 8, 1, 40960)
    rows = rows_of(describe_schedule(schedule))
    assert list(rows) == list(range(1, 17))
    assert rows[2][2] == "1.7"
    assert rows[3][0] == "1.7"
    assert float(rows[9][2]) == pytest.approx(1.7 * (1 - 69 / 140), rel=0.01)
    assert [rows[epoch][3] for epoch in (12, 13)] == ["160", "192"]


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_forecast_is_the_sum_of_its_parts(tiny: Recipe, image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    """By hand: two epochs of 32 images at 32 px and one at 64 px, three validations; cores load and compute."""
    rates = iter([0.04, 0.01, 0.1])  # of steps at 32 px, at 64 px, of evaluation
    monkeypatch.setattr(plan, "rate_of", lambda run, call: next(rates))
    monkeypatch.setattr(plan, "loading_rate", lambda run: 0.02)
    sizes = {"image_size": 64, "initial_image_size": 32, "image_size_ramp_start": 2, "image_size_ramp_end": 3}
    recipe = replace(tiny, epochs=3, **sizes)
    run(recipe, image_folder, tmp_path / "run", dry_run=True, dollars_per_hour=1.5)
    out = capsys.readouterr().out
    seconds = 2 * 32 * (1 / 0.04 + 1 / 0.02) + 32 * (1 / 0.01 + 1 / 0.02) + 3 * 12 * (1 / 0.1 + 1 / 0.02)
    assert (seconds // 3600, round(seconds % 3600 / 60)) == (3, 16)
    assert "about 3 h 16 min on this hardware without saving, of which validation 36 min 0 s" in out
    assert "; 4.90 dollars at 1.5 dollars" in out
    assert "training steps 0 at 32 px, 0 at 64 px" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_speed_is_measured_and_leaves_no_trace(tiny: Recipe, image_folder: Path, tmp_path: Path, capsys):
    """All rates are positive; the price of a real run is in its log, adds up, and is told at the end."""
    run(replace(tiny, epochs=1), image_folder, tmp_path / "run", dry_run=True)
    out = capsys.readouterr().out
    assert "forecast      about " in out
    assert "dollars" not in out
    assert re.search(r"images/s: training steps [1-9][\d,]* at 32 px; loading [1-9][\d,]*; validation [1-9]", out)

    folder = run(replace(tiny, epochs=1), image_folder, tmp_path / "run", dollars_per_hour=3600.0)
    (record,) = [record for record in folder.records() if record["kind"] == "epoch"]
    spent = record["load_seconds"] + record["train_seconds"] + record["val_seconds"]
    assert record["dollars"] == pytest.approx(spent)
    assert f", {spent:,.2f} dollars in all: best" in capsys.readouterr().out
