"""Augmentation policies, which draw operations and strengths from a list for each image. Loader workers run them.

All policies work on Pillow images, as in the recipes that use them, and draw from global random generators, which the
caller has seeded for the image.
"""

from collections.abc import Callable

from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import imagenet

Policy = Callable[[Image.Image], Image.Image]
"""A square RGB image to one of the same size."""


def trivial_augment(recipe: Recipe) -> Policy:
    """TrivialAugmentWide: one operation of any strength (https://arxiv.org/abs/2103.10158)."""
    return v2.TrivialAugmentWide(interpolation=_interpolation(recipe))


def rand_augment(recipe: Recipe) -> Policy:
    """torchvision's RandAugment (https://arxiv.org/abs/1909.13719)."""
    magnitude = int(recipe.rand_augment_magnitude)
    return v2.RandAugment(recipe.rand_augment_num_ops, magnitude, interpolation=_interpolation(recipe))


class TimmRandAugment:
    """timm's RandAugment, increasing variant: each operation is applied with probability 1/2, and its strength varies
    from image to image (https://arxiv.org/abs/2110.00476 trains with it)."""

    def __init__(self, recipe: Recipe):
        self._config = f"rand-m{recipe.rand_augment_magnitude:.0f}-n{recipe.rand_augment_num_ops}-inc1"
        if recipe.rand_augment_magnitude_std:
            self._config += f"-mstd{recipe.rand_augment_magnitude_std:f}"
        self._interpolation = recipe.train_interpolation
        self._policy_of_size: dict[int, Policy] = {}  # made in the worker, because timm's cannot be pickled

    def __call__(self, image: Image.Image) -> Image.Image:
        size = image.size[0]
        if size not in self._policy_of_size:
            self._policy_of_size[size] = self._make(size)
        return self._policy_of_size[size](image)

    def _make(self, size: int) -> Policy:
        from timm.data.auto_augment import rand_augment_transform

        # timm's create_transform sets the same values: shifts of up to 0.45 of the side, and the mean color outside.
        fill = tuple(round(255 * value) for value in imagenet.MEAN)
        settings: dict[str, object] = {"translate_const": int(size * 0.45), "img_mean": fill}
        if self._interpolation != "random":
            settings["interpolation"] = Image.Resampling[self._interpolation.upper()]
        # A strength of 10 would ask for images of 0 bits, which Pillow refuses.
        return rand_augment_transform(self._config, {**settings, "magnitude_max": 9.99})


def auto_augment(recipe: Recipe) -> Policy:
    """AutoAugment's policy for ImageNet (https://arxiv.org/abs/1805.09501)."""
    return v2.AutoAugment(interpolation=_interpolation(recipe))


def _interpolation(recipe: Recipe) -> InterpolationMode:
    # Rotations, shears and shifts interpolate like the training crop; bilinear where that is random.
    return InterpolationMode("bilinear" if recipe.train_interpolation == "random" else recipe.train_interpolation)


POLICIES: dict[str, Callable[[Recipe], Policy | None]] = {
    "none": lambda recipe: None,
    "trivial_augment": trivial_augment,
    "rand_augment": rand_augment,
    "timm_rand_augment": TimmRandAugment,
    "auto_augment": auto_augment,
}
