"""A decoded image to the uint8 square that the network sees: training's random crop, evaluation's centre crop.

Both are called with (image, epoch, index, size) and return (3, size, size) uint8.
"""

from dataclasses import dataclass

import numpy as np
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

from resnet_in1k.core import rng
from resnet_in1k.core.rng import Stream
from resnet_in1k.data.decode import decode
from resnet_in1k.recipes.recipe import Interpolation, Recipe

ASPECT_RATIOS = (3 / 4, 4 / 3)
"""Of training crops, https://arxiv.org/abs/1409.4842."""
SIDES = ("top", "left", "height", "width")
MAX_ASPECT_RATIO = 16
"""Of a longer or taller image, evaluation resizes only the middle: it crops the centre all the same."""


class TrainCrop:
    """Random resized crop, drawn for (seed, epoch, index) (https://arxiv.org/abs/1409.4842)."""

    def __init__(self, *, scale_min: float, seed: int):
        self._crop = RandomResizedCrop(1, scale=(scale_min, 1.0), ratio=ASPECT_RATIOS)  # draws do not depend on size
        self._seed = seed

    def __call__(self, image: Tensor, epoch: int, index: int, size: int) -> Tensor:
        rng.key_global_generator(self._seed, Stream.CROP, epoch, index)
        box = self._crop.make_params([image])
        # The transform's own call gives the same, through layers that cost 40 µs an image.
        return F.resized_crop_image(image, *(box[side] for side in SIDES), [size, size], antialias=True)


class EvalCrop:
    """Short side to `resize_size`, antialiased, then the centre square."""

    def __init__(self, *, resize_size: int, interpolation: Interpolation = "bilinear"):
        self._resize_size, self._interpolation = resize_size, InterpolationMode(interpolation)

    def __call__(self, image: Tensor, epoch: int, index: int, size: int) -> Tensor:
        height, width = image.shape[-2:]
        longest = MAX_ASPECT_RATIO * min(height, width)
        if max(height, width) > longest:  # a line of a million pixels, enlarged, would fill the memory
            image = F.center_crop(image, [min(height, longest), min(width, longest)])
        resized = F.resize(image, [self._resize_size], self._interpolation, antialias=True)
        return F.center_crop(resized, [size])


@dataclass(frozen=True)
class EvalPreprocessing:
    """What evaluation, prediction and publication do to an image before it is normalised."""

    image_size: int
    """Side of the centre crop, in pixels."""
    resize_size: int
    """Short side before the crop, in pixels."""
    interpolation: Interpolation = "bilinear"

    @classmethod
    def of(cls, recipe: Recipe) -> "EvalPreprocessing":
        return cls(recipe.eval_size, recipe.eval_resize_size, recipe.eval_interpolation)

    @property
    def crop(self) -> EvalCrop:
        return EvalCrop(resize_size=self.resize_size, interpolation=self.interpolation)

    def square(self, encoded: np.ndarray) -> np.ndarray:
        """An encoded image as the network sees it, (S, S, 3) uint8, for figures."""
        return self.crop(decode(encoded), 0, 0, self.image_size).permute(1, 2, 0).numpy()
