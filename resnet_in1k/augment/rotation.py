"""Rotation about the center."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from resnet_in1k.augment.operation import Arranged, Draws, uniform
from resnet_in1k.recipes.recipe import Recipe


@dataclass(frozen=True)
class Rotation:
    max_degrees: float
    name: str = "rotation"

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        return {"degrees": uniform(generator, batch_size, -self.max_degrees, self.max_degrees)}

    def apply(self, images: Tensor, targets: Tensor, draws: Arranged) -> tuple[Tensor, Tensor]:
        return rotate(images, draws["degrees"]), targets


def from_recipe(recipe: Recipe, num_classes: int) -> Rotation | None:
    return Rotation(recipe.rotation_degrees) if recipe.rotation_degrees else None


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each image counter-clockwise; nearest pixel, black outside, as torchvision's default.

    Args:
        images: (B, C, S, S) float32.
        degrees: (B,) float32.
    """
    size = images.shape[-1]
    assert images.shape[-2] == size, "the grid below is that of a square"
    radians = degrees * (math.pi / 180)
    cos, sin = radians.cos().view(-1, 1, 1), radians.sin().view(-1, 1, 1)
    # Pixel centers in coordinates from -1 to 1, and where each output pixel comes from. Elementwise: affine_grid is a
    # matrix product, which a GPU may compute in TF32, too coarse for coordinates.
    centers = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    x, y = centers.view(1, 1, -1), centers.view(1, -1, 1)
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)  # (B, S, S, 2)
    return grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)
