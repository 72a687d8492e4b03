"""Horizontal flip."""

from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_in1k.augment.operation import Arranged, Draws
from resnet_in1k.recipes.recipe import Recipe


@dataclass(frozen=True)
class HorizontalFlip:
    probability: float
    name: str = "horizontal_flip"

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        return {"mirrored": torch.rand(batch_size, generator=generator) < self.probability}

    def apply(self, images: Tensor, targets: Tensor, draws: Arranged) -> tuple[Tensor, Tensor]:
        return hflip(images, draws["mirrored"]), targets


def from_recipe(recipe: Recipe, num_classes: int) -> HorizontalFlip | None:
    return HorizontalFlip(recipe.hflip_probability) if recipe.hflip_probability else None


def hflip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images where `mirrored`, (B,) bool, is true."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
