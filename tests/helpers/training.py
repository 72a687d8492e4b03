"""Training in this process, by a recipe small enough for tests."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torchvision.models.resnet import BasicBlock

from resnet_in1k.model.resnet import LAYOUTS, _keys_of
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.scaling import scaled_fields
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.loop import train
from resnet_in1k.train.trainer import TrainOptions

TINY = replace(
    RECIPES["demo"].recipe,
    model="resnet18",
    epochs=2,
    global_batch_size=8,
    lr=0.002,  # so small a network amplifies rounding from step to step; a small step less so
    image_size=32,
    eval_crop_ratio=0.875,
    hflip_probability=0.5,
)
"""With every augmentation but hue."""


def run(recipe: Recipe, data: object, output: Path, **options: object) -> RunFolder:
    """Train in this process, in float32, without workers, with each step logged."""
    how = {"workers": 0, "log_every": 1, "precision": "fp32", **options}
    return RunFolder(train("tiny", recipe, TrainOptions(data=str(data), output_dir=output, **how)))


def losses(folder: RunFolder) -> list[float]:
    return [record["loss"] for record in folder.records() if record["kind"] == "train"]


def reset_accelerate_state() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


@contextlib.contextmanager
def shallow_resnet18() -> Iterator[None]:
    """In the body it has one block in each stage, 5 million weights in place of 11: to save them is half of what
    so short a training takes."""
    before, LAYOUTS["resnet18"] = LAYOUTS["resnet18"], (BasicBlock, (1, 1, 1, 1))
    _keys_of.cache_clear()
    yield
    LAYOUTS["resnet18"] = before
    _keys_of.cache_clear()


def small_version(name: str) -> tuple[Recipe, dict[str, int]]:
    """A named recipe for one epoch of four steps on few small images, as its flags would make it; and options."""
    named = RECIPES[name]
    recipe = replace(named.recipe, **scaled_fields(named.recipe, 1, 8, 32), model="resnet18")
    how = {"checkpoint_every": 2, "keep_checkpoints": 9}
    return recipe, {**how, "gradient_accumulation_steps": 2 if named.images_per_forward_pass else 1}
