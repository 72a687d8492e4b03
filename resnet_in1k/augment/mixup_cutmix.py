"""Mixup (https://arxiv.org/abs/1710.09412) and cutmix (https://arxiv.org/abs/1905.04899), of neighbors in the batch.

For a pair, each gives what torchvision's v2.MixUp and v2.CutMix give for a batch of these two.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from resnet_in1k.augment.operation import Arranged, Draws
from resnet_in1k.recipes.recipe import Recipe


@dataclass(frozen=True)
class Mixing:
    """Both at once: each pixel of the result is a weighted mean of the two images' pixels. The weight of the image
    itself is, for mixup, the same everywhere; for cutmix 0 in a rectangle and 1 outside."""

    mixup_alpha: float
    cutmix_alpha: float
    by_pair: bool
    num_classes: int
    name: str = "mixing"

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        """`is_cutmix` (B,) bool, `weight` (B,) of the image itself, `center` (B, 2) of the rectangle, as a share of the
        side; the same for both images of a pair, or for all of the batch."""
        # torch has no Beta distribution that takes a generator.
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        random, number = np.random.default_rng(seed), batch_size // 2 if self.by_pair else 1
        share_of_cutmix = bool(self.cutmix_alpha) / (1 + bool(self.mixup_alpha))
        is_cutmix = random.random(number) < share_of_cutmix
        by_alpha = [random.beta(alpha or 1, alpha or 1, number) for alpha in (self.mixup_alpha, self.cutmix_alpha)]
        draws = {
            "is_cutmix": torch.from_numpy(is_cutmix),
            "weight": torch.from_numpy(np.where(is_cutmix, by_alpha[1], by_alpha[0])).float(),
            "center": torch.from_numpy(random.random((number, 2))).float(),
        }
        return {name: values.repeat_interleave(batch_size // number, dim=0) for name, values in draws.items()}

    def apply(self, images: Tensor, targets: Tensor, draws: Arranged) -> tuple[Tensor, Tensor]:
        inside = _rectangles(draws["center"], draws["weight"], images.shape[-1])  # (B, 1, S, S)
        is_cutmix = draws["is_cutmix"].view(-1, 1, 1, 1)
        weights = torch.where(is_cutmix, (~inside).float(), draws["weight"].view(-1, 1, 1, 1))
        dense = one_hot(targets, self.num_classes).float()
        # Of cutmix what the rectangle really covers, as it may reach over the edge.
        target_weights = weights.mean(dim=(1, 2, 3)).where(draws["is_cutmix"], draws["weight"]).view(-1, 1)
        mixed = images * weights + _neighbors(images) * (1 - weights)
        return mixed, dense * target_weights + _neighbors(dense) * (1 - target_weights)


def from_recipe(recipe: Recipe, num_classes: int) -> Mixing | None:
    if not recipe.mixes:
        return None
    return Mixing(recipe.mixup_alpha, recipe.cutmix_alpha, recipe.mix_by_pair, num_classes)


def _neighbors(values: Tensor) -> Tensor:
    """(B, …) with 2k and 2k + 1 exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _rectangles(centers: Tensor, weights: Tensor, size: int) -> Tensor:
    """(B, 1, S, S) bool: the square of the share 1 - weight of the image about the center, as far as it is within."""
    middle = (centers * size).floor().view(-1, 2, 1)
    half = (0.5 * size * (1 - weights).sqrt()).floor().view(-1, 1, 1)
    places = torch.arange(size, device=centers.device)
    within = (places >= middle - half) & (places < middle + half)  # (B, 2, S)
    return within[:, 0, None, :, None] & within[:, 1, None, None, :]
