from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train import plan
from resnet_in1k.train.plan import describe_plan

TUTORIAL = RECIPES["tutorial"].recipe


def plan_of(recipe: Recipe, image_folder: Path) -> str:
    train, val = open_train_and_val(str(image_folder))
    run = SimpleNamespace(
        recipe_name="tutorial",
        recipe=recipe,
        schedule=StepCounts(recipe, num_processes=2, gradient_accumulation_steps=3, num_train_images=len(train)),
        initial=None,
        train_source=train,
        val_source=val,
        device=torch.device("cpu"),
        accelerator=SimpleNamespace(mixed_precision="bf16"),
        workers=1,
        cpu_threads=2,
    )
    return describe_plan(run)


def test_plan_lists_what_the_run_will_do(image_folder: Path):
    text = plan_of(replace(TUTORIAL, global_batch_size=12, epochs=7), image_folder)
    for part in (
        "tutorial, but epochs 20 → 7; global_batch_size 256 → 12",
        "resnet50, 6 classes, 224 px\n",
        "37 training and 12 validation images",
        "12 global = 2 processes × 6 in 3 accumulation steps of 2",
        "3 an epoch (1 image dropped each epoch, others each time) × 7 epochs = 21",
        "0.1, × 0.2 every 5 epochs",
        "bfloat16 autocast, channels_last",
        "1 loader worker, 2 CPU threads",
    ):
        assert part in text


def test_plan_names_changing_sizes(image_folder: Path):
    sizes = {"initial_image_size": 128, "image_size_ramp_start": 2, "image_size_ramp_end": 5, "eval_image_size": 256}
    text = plan_of(replace(TUTORIAL, global_batch_size=12, **sizes), image_folder)
    assert "128 px, growing to 224 px from epoch 2 to 5, evaluated at 256 px" in text


def test_plan_notes_what_the_device_lacks(image_folder: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = replace(TUTORIAL, global_batch_size=12)
    assert "  note" not in plan_of(recipe, image_folder)
    monkeypatch.setattr(plan, "missing_capabilities", lambda device: [f"no side stream on {device}", "no more"])
    assert "\n  note          no side stream on cpu\n  note          no more" in plan_of(recipe, image_folder)
