"""Augmentation policies: for each image operations and strengths are drawn from a list. They run in the loader workers.

All work on Pillow images, as in the recipes that they are taken from, and draw from global random generators, which the
caller has keyed by the sample.
"""

from collections.abc import Callable

from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.validation import lookup

Policy = Callable[[Image.Image], Image.Image]
"""A square RGB image to one of the same size."""


def trivial_augment(recipe: Recipe) -> Policy:
    """TrivialAugmentWide: one operation of any strength (https://arxiv.org/abs/2103.10158)."""
    return v2.TrivialAugmentWide(interpolation=_interpolation(recipe))


def rand_augment(recipe: Recipe) -> Policy:
    """torchvision's RandAugment (https://arxiv.org/abs/1909.13719)."""
    return v2.RandAugment(
        recipe.rand_augment_num_ops, int(recipe.rand_augment_magnitude), interpolation=_interpolation(recipe)
    )


class TimmRandAugment:
    """timm's RandAugment, its increasing variant: each operation is applied with probability 1/2, and its strength
    varies from image to image (https://arxiv.org/abs/2110.00476 trains with it)."""

    def __init__(self, recipe: Recipe):
        magnitude, num_ops = recipe.rand_augment_magnitude, recipe.rand_augment_num_ops
        self._words = f"rand-m{magnitude:.0f}-n{num_ops}-inc1"
        if recipe.rand_augment_magnitude_std:
            self._words += f"-mstd{recipe.rand_augment_magnitude_std:f}"
        self._interpolation = recipe.train_interpolation
        self._by_size: dict[int, Policy] = {}

    def __call__(self, image: Image.Image) -> Image.Image:
        size = image.size[0]
        if size not in self._by_size:
            self._by_size[size] = self._for_size(size)
        return self._by_size[size](image)

    def _for_size(self, size: int) -> Policy:
        from timm.data.auto_augment import rand_augment_transform

        # As timm's create_transform sets them: shifts of up to 0.45 of the side, and the mean color outside.
        fill = tuple(round(255 * value) for value in imagenet.MEAN)
        settings: dict[str, object] = {"translate_const": int(size * 0.45), "img_mean": fill}
        if self._interpolation != "random":
            settings["interpolation"] = Image.Resampling[self._interpolation.upper()]
        # At a strength of 10 it would ask for images of 0 bits, which Pillow refuses.
        return rand_augment_transform(self._words, {**settings, "magnitude_max": 9.99})


def auto_augment(recipe: Recipe) -> Policy:
    """AutoAugment's policy for ImageNet (https://arxiv.org/abs/1805.09501)."""
    return v2.AutoAugment(interpolation=_interpolation(recipe))


def _interpolation(recipe: Recipe) -> InterpolationMode:
    """Of rotations, shears and shifts: as of training's resizing; bilinear where that is random."""
    return InterpolationMode("bilinear" if recipe.train_interpolation == "random" else recipe.train_interpolation)


def none(recipe: Recipe) -> None:
    return None


POLICIES: dict[str, Callable[[Recipe], Policy | None]] = {
    "none": none,
    "trivial_augment": trivial_augment,
    "rand_augment": rand_augment,
    "timm_rand_augment": TimmRandAugment,
    "auto_augment": auto_augment,
}


def build_policy(recipe: Recipe) -> Policy | None:
    """None for a recipe without. Raises UserError if the recipe's augment_policy is not in POLICIES."""
    return lookup(POLICIES, recipe.augment_policy, "augment_policy")(recipe)
