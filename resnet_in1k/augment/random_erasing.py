"""Random erasing (https://arxiv.org/abs/1708.04896): a rectangle of the image gets the mean color.

As torchvision's RandomErasing with its defaults, which sets the normalized values to 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_in1k.augment.normalize import mean_color
from resnet_in1k.augment.operation import Arranged, Draws, uniform
from resnet_in1k.recipes.recipe import Recipe

AREAS = (0.02, 0.33)
"""Of the rectangle, as a share of the image's."""
ASPECT_RATIOS = (0.3, 3.3)
NUM_ATTEMPTS = 10
"""Rectangles drawn until one is within the image; if none is, nothing is erased."""


@dataclass(frozen=True)
class RandomErasing:
    probability: float
    name: str = "random_erasing"

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        """`sides` (B, 2), height and width as shares of the image's side, 0 where nothing is erased; `corner` (B, 2),
        from 0 to 1 of the places where its upper left corner can be."""
        is_erased = torch.rand(batch_size, generator=generator) < self.probability
        number = batch_size * NUM_ATTEMPTS
        areas = uniform(generator, number, *AREAS)
        ratios = uniform(generator, number, *(math.log(ratio) for ratio in ASPECT_RATIOS)).exp()
        sides = torch.stack([areas * ratios, areas / ratios], dim=1).sqrt().view(batch_size, NUM_ATTEMPTS, 2)
        fits = (sides < 1).all(dim=2)
        first = fits.int().argmax(dim=1)  # of equal values the first
        sides = sides[torch.arange(batch_size), first]
        sides = sides * (is_erased & fits.any(dim=1)).view(-1, 1)
        return {"sides": sides, "corner": torch.rand(batch_size, 2, generator=generator)}

    def apply(self, images: Tensor, targets: Tensor, draws: Arranged) -> tuple[Tensor, Tensor]:
        size = images.shape[-1]
        lengths = (draws["sides"] * size).round().clamp(max=size - 1)  # (B, 2)
        first = (draws["corner"] * (size - lengths + 1)).floor()
        places = torch.arange(size, device=images.device)
        within = (places >= first.unsqueeze(2)) & (places < (first + lengths).unsqueeze(2))  # (B, 2, S)
        inside = within[:, 0, None, :, None] & within[:, 1, None, None, :]
        return torch.where(inside, mean_color(images.device), images), targets


def from_recipe(recipe: Recipe, num_classes: int) -> RandomErasing | None:
    return RandomErasing(recipe.random_erasing_probability) if recipe.random_erasing_probability else None
