"""On what and at which size gpu_check.py works, and how one of its parts says that it fails or is left out."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from resnet_in1k.cli.benchmark_parts import random_images
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.launch import Launch


class CheckFailedError(Exception):
    """What was seen in place of what must be."""


class LeftOutError(Exception):
    """Why a check or a measurement cannot be done here."""


@dataclass(frozen=True)
class Setting:
    accelerator: Accelerator
    launch: Launch
    folder: Path
    """For files that nobody needs afterwards."""
    data: str
    """As `--data` of training, for measurements."""
    toy: bool

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def recipe(self) -> Recipe:
        """The tutorial's, with every augmentation; small in a toy setting."""
        recipe = RECIPES["tutorial"].recipe
        return replace(recipe, model="resnet18", image_size=32, global_batch_size=8) if self.toy else recipe

    def images(self, number: int = 0) -> torch.Tensor:
        """A batch of generated images, (B, 3, S, S) uint8 in channels_last, on the CPU; another for each number."""
        recipe, generator = self.recipe, torch.Generator().manual_seed(number)
        return random_images(recipe.global_batch_size, recipe.image_size, torch.device("cpu"), generator)

    def labels(self) -> torch.Tensor:
        """(B,) int64, on the CPU."""
        return torch.arange(self.recipe.global_batch_size) % 1000


def check(holds: bool, seen: str) -> None:
    """Raises CheckFailedError unless it holds."""
    if not holds:
        raise CheckFailedError(seen)
