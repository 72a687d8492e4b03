"""New recipe fields, losses, optimizers, schedules and tensor groups, added from outside.

Each is what somebody would write in a file of its own and one line in a table. tests/docs/test_contributing.py adds a
recipe, an augmentation and a dataset.
"""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import assert_same_end
from helpers.training import losses, rewind, run
from safetensors.torch import load_file

from resnet_in1k.optim.losses import LOSSES
from resnet_in1k.optim.lr import LR_SCHEDULES
from resnet_in1k.optim.optimizers import OPTIMIZERS
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train import trainer
from resnet_in1k.utils.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow")]


def resumed(folder: RunFolder, step: int, copy: Path, recipe: Recipe, data: object, **options: object) -> RunFolder:
    """A copy of the run, resumed from that checkpoint."""
    return run(recipe, data, rewind(folder, step, copy).path, resume=True, keep_checkpoints=9, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongerRecipe(Recipe):
    """Recipe, as a later version may have it."""

    new_field: float = 0.0
    """Off."""


def test_recipe_field(tiny: Recipe, image_folder: Path, finished: RunFolder, tmp_path: Path):
    """Off, it lets an older run resume; on, it is recorded, and a run without it is not resumed with it."""
    longer = LongerRecipe(**dataclasses.asdict(tiny))
    old = resumed(finished, 4, tmp_path / "old", longer, image_folder)
    assert losses(old) == losses(finished)
    with pytest.raises(UserError, match=r"started with other settings: new_field 0\.0 → 1\.0"):
        run(replace(longer, new_field=1.0), image_folder, old.path, resume=True)

    on = replace(longer, new_field=1.0, epochs=1)
    folder = run(on, image_folder, tmp_path / "new")
    assert json.loads(folder.recipe.read_text())["recipe"]["new_field"] == 1.0
    run(on, image_folder, folder.path, resume=True)


def test_loss_optimizer_and_schedule(tiny: Recipe, image_folder: Path, tmp_path: Path, monkeypatch):
    """Adam with moments and a step count per parameter, multi-label loss, a rate that rises: resumed exactly."""

    def one_against_all(recipe: Recipe, class_weights: torch.Tensor | None):
        return lambda logits, targets: torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.nn.functional.one_hot(targets, logits.shape[1]).float()
        )

    monkeypatch.setitem(LOSSES, "one_against_all", one_against_all)
    monkeypatch.setitem(OPTIMIZERS, "adam", lambda groups, recipe, fused: torch.optim.Adam(groups))
    monkeypatch.setitem(LR_SCHEDULES, "rising", lambda recipe, epochs_done, progress: progress)
    recipe = replace(tiny, loss="one_against_all", optimizer="adam", lr_schedule="rising", warmup_epochs=0)
    folder = run(recipe, image_folder, tmp_path / "run", checkpoint_every=3, keep_checkpoints=9)
    assert losses(folder)[0] == pytest.approx(np.log(2), abs=0.3)  # each class is undecided at first
    assert [record["lr"] for record in folder.records() if record["kind"] == "train"] == pytest.approx(
        [0.002 * done / 8 for done in range(8)]
    )
    names = load_file(folder.checkpoints / "step_00000003/optimizer.safetensors")
    assert names["fc.bias.exp_avg_sq"].shape == (6,)
    assert names["fc.bias.step"].item() == 3
    assert_same_end(resumed(folder, 3, tmp_path / "copy", recipe, image_folder, checkpoint_every=3), folder)


class Chance:
    """A tensor drawn by chance."""

    def __init__(self):
        self.value = torch.randn(3)

    def tensors(self):
        return {"value": self.value.clone()}

    def load(self, tensors) -> None:
        self.value = tensors["value"]


def test_tensor_group(tiny: Recipe, image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    """Saved with its own sum and loaded again; a damaged one is named, and the checkpoint before it is taken."""
    made: list[Chance] = []
    plain = trainer.Trainer._make_parts

    def with_chance(self: trainer.Trainer):
        plain(self)
        made.append(Chance())
        self.groups["chance"] = made[-1]

    monkeypatch.setattr(trainer.Trainer, "_make_parts", with_chance)
    folder = run(tiny, image_folder, tmp_path / "run", keep_checkpoints=9)
    with (folder.checkpoints / "step_00000008/chance.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    run(tiny, image_folder, folder.path, resume=True, keep_checkpoints=9)
    assert "step_00000008/chance.safetensors is damaged" in capsys.readouterr().out
    first, second = made
    assert torch.equal(first.value, second.value)


def test_image_size_changes_with_the_epoch(tiny: Recipe, image_folder: Path, tmp_path: Path):
    """Epochs at 32, 64 and 96 px, evaluated at 80 px of 100, bicubic: resumed exactly, with workers."""
    sizes = {"image_size": 96, "initial_image_size": 32, "image_size_ramp_start": 1, "image_size_ramp_end": 3}
    evaluated = {"eval_image_size": 80, "eval_crop_ratio": 0.8, "eval_interpolation": "bicubic"}
    recipe = replace(tiny, epochs=3, **sizes, **evaluated)
    folder = run(recipe, image_folder, tmp_path / "run", keep_checkpoints=9)
    result = json.loads(folder.evaluation.read_text())
    assert (result["image_size"], result["resize_size"], result["interpolation"]) == (80, 100, "bicubic")
    assert_same_end(resumed(folder, 4, tmp_path / "copy", recipe, image_folder, workers=1), folder)
