"""Horizontal flip, rotation and random erasing of a batch, each image with its own draws."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from resnet_in1k.augment.normalize import mean_color
from resnet_in1k.recipes.recipe import Recipe

ERASED_AREAS = (0.02, 0.33)
"""Range of the erased rectangle's area, as a share of the image's."""
ERASED_ASPECT_RATIOS = (0.3, 3.3)
NUM_ATTEMPTS = 10
"""Rectangles drawn until one fits into the image; if none fits, nothing is erased."""


def uniform(generator: torch.Generator, size: int, low: float, high: float) -> Tensor:
    return torch.empty(size).uniform_(low, high, generator=generator)


@dataclass(frozen=True)
class HorizontalFlip:
    probability: float
    name: str = "horizontal_flip"
    works_on_uint8: bool = True

    @classmethod
    def from_recipe(cls, recipe: Recipe, num_classes: int) -> "HorizontalFlip | None":
        return cls(recipe.hflip_probability) if recipe.hflip_probability else None

    def draw(self, generator: torch.Generator, batch_size: int) -> tuple[Tensor, None]:
        """(B, 1): 1 where the image is mirrored."""
        return (torch.rand(batch_size, 1, generator=generator) < self.probability).float(), None

    def apply(self, images: Tensor, targets: Tensor, draws: Tensor, shared: None) -> tuple[Tensor, Tensor]:
        return torch.where(draws.bool().view(-1, 1, 1, 1), images.flip(-1), images), targets


@dataclass(frozen=True)
class Rotation:
    max_degrees: float
    name: str = "rotation"
    works_on_uint8: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, num_classes: int) -> "Rotation | None":
        return cls(recipe.rotation_degrees) if recipe.rotation_degrees else None

    def draw(self, generator: torch.Generator, batch_size: int) -> tuple[Tensor, None]:
        """(B, 1): degrees."""
        return uniform(generator, batch_size, -self.max_degrees, self.max_degrees).view(-1, 1), None

    def apply(self, images: Tensor, targets: Tensor, draws: Tensor, shared: None) -> tuple[Tensor, Tensor]:
        return rotate(images, draws[:, 0]), targets


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each image counter-clockwise about its center; nearest pixel, black outside, as torchvision's default.

    Args:
        images: (B, C, S, S) float32.
        degrees: (B,) float32.
    """
    size = images.shape[-1]
    assert images.shape[-2] == size, "the grid below is that of a square"
    radians = degrees * (math.pi / 180)
    cos, sin = radians.cos().view(-1, 1, 1), radians.sin().view(-1, 1, 1)
    # Pixel centers in coordinates from -1 to 1, and the source of each output pixel. Elementwise, because affine_grid
    # is a matrix product: a GPU may compute it in TF32, which is too coarse for coordinates.
    centers = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    x, y = centers.view(1, 1, -1), centers.view(1, -1, 1)
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)  # (B, S, S, 2)
    return grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


@dataclass(frozen=True)
class RandomErasing:
    """Fill a rectangle with the mean color, as torchvision's RandomErasing does with its defaults after normalization
    (https://arxiv.org/abs/1708.04896)."""

    probability: float
    name: str = "random_erasing"
    works_on_uint8: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, num_classes: int) -> "RandomErasing | None":
        return cls(recipe.random_erasing_probability) if recipe.random_erasing_probability else None

    def draw(self, generator: torch.Generator, batch_size: int) -> tuple[Tensor, None]:
        """(B, 4): height and width as shares of the image's side, 0 where nothing is erased; the position of the upper
        left corner, from 0 to 1 of the possible ones."""
        is_erased = torch.rand(batch_size, generator=generator) < self.probability
        number = batch_size * NUM_ATTEMPTS
        areas = uniform(generator, number, *ERASED_AREAS)
        ratios = uniform(generator, number, *(math.log(ratio) for ratio in ERASED_ASPECT_RATIOS)).exp()
        sides = torch.stack([areas * ratios, areas / ratios], dim=1).sqrt().view(batch_size, NUM_ATTEMPTS, 2)
        fits = (sides < 1).all(dim=2)
        first = fits.int().argmax(dim=1)  # argmax returns the first of equal values
        sides = sides[torch.arange(batch_size), first] * (is_erased & fits.any(dim=1)).view(-1, 1)
        return torch.cat([sides, torch.rand(batch_size, 2, generator=generator)], dim=1), None

    def apply(self, images: Tensor, targets: Tensor, draws: Tensor, shared: None) -> tuple[Tensor, Tensor]:
        size = images.shape[-1]
        lengths = (draws[:, :2] * size).round().clamp(max=size - 1)  # (B, 2)
        first = (draws[:, 2:] * (size - lengths + 1)).floor()
        inside = rectangles(first, first + lengths, size)
        return torch.where(inside, mean_color(images.device), images), targets


def rectangles(first: Tensor, end: Tensor, size: int) -> Tensor:
    """Masks of rectangles, (B, 1, S, S) bool.

    Args:
        first, end: (B, 2), the rows and columns at which each rectangle begins, and before which it ends, in pixels.
    """
    places = torch.arange(size, device=first.device)
    within = (places >= first.unsqueeze(2)) & (places < end.unsqueeze(2))  # (B, 2, S)
    return within[:, 0, None, :, None] & within[:, 1, None, None, :]
