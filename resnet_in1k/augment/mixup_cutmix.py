"""Mixup (https://arxiv.org/abs/1710.09412) and CutMix (https://arxiv.org/abs/1905.04899) of neighbors in the batch.

A pair gives what torchvision's v2.MixUp and v2.CutMix give for a batch of these two images.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from resnet_in1k.augment.flip_rotate_erase import rectangles
from resnet_in1k.recipes.recipe import Recipe


@dataclass(frozen=True)
class Mixing:
    """Mixup and CutMix in one formula: each pixel is a weighted mean of the two images' pixels.

    Mixup has the same weight everywhere. CutMix has weight 0 in a rectangle and 1 outside.
    """

    mixup_alpha: float
    cutmix_alpha: float
    by_pair: bool
    num_classes: int
    name: str = "mixing"
    works_on_uint8: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, num_classes: int) -> "Mixing | None":
        if not recipe.mixes:
            return None
        return cls(recipe.mixup_alpha, recipe.cutmix_alpha, recipe.mix_by_pair, num_classes)

    def draw(self, generator: torch.Generator, batch_size: int) -> tuple[Tensor, None]:
        """(B, 4): 1 for CutMix and 0 for mixup; the weight of the image itself; the rectangle's center as a share of
        the side. All four are equal for both images of a pair, or for the complete batch."""
        # torch has no Beta distribution that takes a generator.
        random = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
        number = batch_size // 2 if self.by_pair else 1
        is_cutmix = random.random(number) < bool(self.cutmix_alpha) / (1 + bool(self.mixup_alpha))
        mixup_weight, cutmix_weight = (
            random.beta(alpha or 1, alpha or 1, number) for alpha in (self.mixup_alpha, self.cutmix_alpha)
        )
        weight, center = np.where(is_cutmix, cutmix_weight, mixup_weight), random.random((number, 2))
        draws = torch.from_numpy(np.column_stack([is_cutmix, weight, center])).float()
        return draws.repeat_interleave(batch_size // number, dim=0), None

    def apply(self, images: Tensor, targets: Tensor, draws: Tensor, shared: None) -> tuple[Tensor, Tensor]:
        """Mix each image with its neighbor; the targets become probabilities, (B, C) float32."""
        size = images.shape[-1]
        is_cutmix, weight = draws[:, 0].bool(), draws[:, 1]
        center = (draws[:, 2:] * size).floor()  # (B, 2)
        half = (0.5 * size * (1 - weight).sqrt()).floor().unsqueeze(1)
        inside = rectangles(center - half, center + half, size)  # (B, 1, S, S)
        weights = torch.where(is_cutmix.view(-1, 1, 1, 1), (~inside).float(), weight.view(-1, 1, 1, 1))
        # CutMix's rectangle may reach over the edge, so its weight is the share that it really covers.
        target_weights = weights.mean(dim=(1, 2, 3)).where(is_cutmix, weight).unsqueeze(1)
        dense = one_hot(targets, self.num_classes).float()
        mixed = images * weights + _neighbors(images) * (1 - weights)
        return mixed, dense * target_weights + _neighbors(dense) * (1 - target_weights)


def _neighbors(values: Tensor) -> Tensor:
    """(B, …) with rows 2k and 2k + 1 exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
