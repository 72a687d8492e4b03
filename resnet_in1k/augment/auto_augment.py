"""Augmentation policies, which draw operations and strengths from a list for each image. Loader workers run them.

All policies work on Pillow images, as in the recipes that use them, and draw from global random generators, which the
caller has seeded for the image.
"""

import functools
from collections.abc import Callable

from PIL import Image
from torchvision.transforms import v2

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import imagenet

Policy = Callable[[Image.Image], Image.Image]
"""A square RGB image to one of the same size. It is sent to the workers, so it must be picklable."""


def _interpolation(recipe: Recipe) -> v2.InterpolationMode:
    # Rotations, shears and shifts interpolate like the training crop; bilinear where that is random.
    return v2.InterpolationMode("bilinear" if recipe.train_interpolation == "random" else recipe.train_interpolation)


def timm_rand_augment(recipe: Recipe, image: Image.Image) -> Image.Image:
    """Apply timm's RandAugment, increasing variant: each operation with probability 1/2, its strength varies from image
    to image."""
    return _timm_policy(recipe, image.size[0])(image)


@functools.cache
def _timm_policy(recipe: Recipe, size: int) -> Policy:
    from timm.data.auto_augment import rand_augment_transform

    config = f"rand-m{recipe.rand_augment_magnitude:.0f}-n{recipe.rand_augment_num_ops}-inc1"
    if recipe.rand_augment_magnitude_std:
        config += f"-mstd{recipe.rand_augment_magnitude_std:f}"
    # timm's create_transform sets the same values: shifts of up to 0.45 of the side, and the mean color outside.
    fill = tuple(round(255 * value) for value in imagenet.MEAN)
    settings: dict[str, object] = {"translate_const": int(size * 0.45), "img_mean": fill}
    if recipe.train_interpolation != "random":
        settings["interpolation"] = Image.Resampling[recipe.train_interpolation.upper()]
    # A strength of 10 would ask for images of 0 bits, which Pillow refuses.
    return rand_augment_transform(config, {**settings, "magnitude_max": 9.99})


POLICIES: dict[str, Callable[[Recipe], Policy | None]] = {
    "none": lambda recipe: None,
    # https://arxiv.org/abs/2103.10158: one operation of any strength.
    "trivial_augment": lambda recipe: v2.TrivialAugmentWide(interpolation=_interpolation(recipe)),
    # https://arxiv.org/abs/1909.13719
    "rand_augment": lambda recipe: v2.RandAugment(
        recipe.rand_augment_num_ops, int(recipe.rand_augment_magnitude), interpolation=_interpolation(recipe)
    ),
    # https://arxiv.org/abs/2110.00476 trains with it.
    "timm_rand_augment": lambda recipe: functools.partial(timm_rand_augment, recipe),
    # https://arxiv.org/abs/1805.09501: the policy for ImageNet.
    "auto_augment": lambda recipe: v2.AutoAugment(interpolation=_interpolation(recipe)),
}
