"""Augmentation policies: for each image operations and strengths are drawn from a list. They run in the loader workers.

All work on Pillow images, as in the recipes that they are taken from, and draw from global random generators, which the
caller has keyed by the sample.
"""

import functools
from collections.abc import Callable

from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from resnet_in1k.core import imagenet
from resnet_in1k.core.tables import choose
from resnet_in1k.recipes.recipe import Recipe

Policy = Callable[[Image.Image], Image.Image]
"""A square RGB image to one of the same size."""


def trivial_augment(recipe: Recipe) -> Policy:
    """TrivialAugmentWide: one operation of any strength (https://arxiv.org/abs/2103.10158)."""
    return v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)


def rand_augment(recipe: Recipe) -> Policy:
    """torchvision's RandAugment (https://arxiv.org/abs/1909.13719)."""
    return v2.RandAugment(
        recipe.rand_augment_num_ops, round(recipe.rand_augment_magnitude), interpolation=InterpolationMode.BILINEAR
    )


def timm_rand_augment(recipe: Recipe) -> Policy:
    """timm's RandAugment, its increasing variant: each operation is applied with probability 1/2, and its strength
    varies from image to image (https://arxiv.org/abs/2110.00476 trains with it)."""
    from timm.data.auto_augment import rand_augment_transform

    words = f"rand-m{recipe.rand_augment_magnitude:.0f}-n{recipe.rand_augment_num_ops}-inc1"
    words += f"-mstd{recipe.rand_augment_magnitude_std:g}" if recipe.rand_augment_magnitude_std else ""

    @functools.cache
    def for_size(size: int) -> Policy:
        # As timm's create_transform sets them: shifts of up to 0.45 of the side, and the mean colour outside.
        fill = tuple(round(255 * value) for value in imagenet.MEAN)
        settings = {"translate_const": int(size * 0.45), "img_mean": fill}
        # At a strength of 10 it would ask for images of 0 bits, which Pillow refuses.
        return rand_augment_transform(words, {**settings, "magnitude_max": 9.99})

    return lambda image: for_size(image.size[0])(image)


def auto_augment(recipe: Recipe) -> Policy:
    """AutoAugment's policy for ImageNet (https://arxiv.org/abs/1805.09501)."""
    return v2.AutoAugment(interpolation=InterpolationMode.BILINEAR)


def none(recipe: Recipe) -> None:
    return None


POLICIES: dict[str, Callable[[Recipe], Policy | None]] = {
    "none": none,
    "trivial_augment": trivial_augment,
    "rand_augment": rand_augment,
    "timm_rand_augment": timm_rand_augment,
    "auto_augment": auto_augment,
}


def build_policy(recipe: Recipe) -> Policy | None:
    """None for a recipe without. Raises UserError if the recipe's augment_policy is not in POLICIES."""
    return choose(POLICIES, recipe.augment_policy, "augment_policy")(recipe)
