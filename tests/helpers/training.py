"""Training in this process, by a recipe small enough for tests."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.models.resnet import Bottleneck

from helpers.processes import TINY_FIELDS
from resnet_in1k.model.resnet import LAYOUTS
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import scaled
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.loop import train
from resnet_in1k.train.trainer import TrainOptions

TINY = replace(RECIPES["demo"].recipe, **TINY_FIELDS)


def run(recipe: Recipe, data: object, output: Path, **options: object) -> RunFolder:
    """Train in this process, in float32, without workers, with each step logged."""
    reset_accelerate_state()
    how = {"workers": 0, "log_every": 1, "precision": "fp32", **options}
    return RunFolder(train("tiny", recipe, TrainOptions(data=str(data), output_dir=output, **how)))


def losses(folder: RunFolder) -> list[float]:
    return [record["loss"] for record in folder.records() if record["kind"] == "train"]


def reset_accelerate_state() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


def rewind(folder: RunFolder, step: int, copy: Path | None = None) -> RunFolder:
    """Delete all checkpoints after `step`, as if the run had been killed then; in a copy of the folder, if given."""
    if copy:
        folder = RunFolder(Path(shutil.copytree(folder.path, copy)))
    for checkpoint in folder.checkpoints.iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    return folder


class NarrowBlock(Bottleneck):
    """As wide as a BasicBlock outside, an eighth of that inside."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: torch.nn.Module | None, *_: object):
        super().__init__(inplanes, planes, stride, downsample, base_width=8)


@contextlib.contextmanager
def narrow_resnet18() -> Iterator[None]:
    """In the body a resnet18 has one narrow block in each stage: 1 MB of weights, not 45, to compute and to save."""
    before, LAYOUTS["resnet18"] = LAYOUTS["resnet18"], (NarrowBlock, (1, 1, 1, 1))
    yield
    LAYOUTS["resnet18"] = before


def small_version(name: str) -> tuple[Recipe, dict[str, int]]:
    """A named recipe for one epoch of four steps on few small images, as its flags would make it; and options."""
    named = RECIPES[name]
    recipe = replace(scaled(named.recipe, epochs=1, global_batch_size=8, image_size=32), model="resnet18")
    how = {"checkpoint_every": 2, "keep_checkpoints": 9}
    return recipe, {**how, "gradient_accumulation_steps": 2 if named.images_per_forward_pass else 1}
