"""A decoded image to the uint8 square that the network sees: training's random crop, evaluation's center crop."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

from resnet_in1k.augment.auto_augment import POLICIES
from resnet_in1k.data.decode import decode
from resnet_in1k.data.sampler import Sample
from resnet_in1k.recipes.recipe import Interpolation, Recipe, resize_size_for
from resnet_in1k.utils import imagenet, rng
from resnet_in1k.utils.rng import Stream
from resnet_in1k.utils.validation import lookup

MAX_ASPECT_RATIO = 16
"""Evaluation cuts longer or taller images to this ratio before it resizes them; the center crop stays the same."""


Crop = Callable[[Sequence[Tensor], Sequence[Sample], int], Iterator[Tensor]]
"""Function from (images (3, H, W) uint8, samples, size) to one (3, size, size) uint8 crop per image."""


class TrainCrop:
    """Random resized crop (https://arxiv.org/abs/1409.4842), then the recipe's policy and alternating flip.

    All draws are a function of (seed, sample).
    """

    def __init__(self, recipe: Recipe):
        """Raises UserError if the recipe's augment_policy is not registered."""
        # The draws do not depend on the size, which may change from epoch to epoch.
        self._crop = RandomResizedCrop(1, scale=(recipe.crop_scale_min, 1.0))
        self._recipe, self._policy = recipe, lookup(POLICIES, recipe.augment_policy, "augment_policy")(recipe)

    def __call__(self, images: Sequence[Tensor], samples: Sequence[Sample], size: int) -> Iterator[Tensor]:
        # Draw for all images before resizing the first: see GROUP_IMAGES in the loader.
        drawn = [self._draw(image, sample) for image, sample in zip(images, samples, strict=True)]
        for (cut, mode), sample in zip(drawn, samples, strict=True):
            # Equal to torchvision's `resize`. Copied to channels_last, the decoder's layout, first: PyTorch would
            # convert any other layout twice.
            packed = cut.unsqueeze(0).contiguous(memory_format=torch.channels_last)
            square = interpolate(packed, [size, size], mode=mode, align_corners=False, antialias=True).squeeze(0)
            if self._policy is not None:
                rng.key_global_generators(self._recipe.seed, Stream.POLICY, *sample.key)
                picture = self._policy(Image.fromarray(square.permute(1, 2, 0).numpy()))
                square = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            if self._recipe.alternating_flip:
                # In every other epoch; a random bit of the image decides between even and odd ones.
                bit = rng.key(self._recipe.seed, Stream.FLIP, sample.index)
                square = square.flip(-1) if (bit + sample.epoch + sample.copy) % 2 else square
            yield square

    def _draw(self, image: Tensor, sample: Sample) -> tuple[Tensor, str]:
        """The part of the image to resize, and the interpolation."""
        rng.key_global_generator(self._recipe.seed, Stream.CROP, *sample.key)
        box = self._crop.make_params([image])
        mode = self._recipe.train_interpolation
        if mode == "random":
            mode = "bicubic" if torch.rand(()) < 0.5 else "bilinear"
        return image[:, box["top"] :, box["left"] :][:, : box["height"], : box["width"]], mode


@dataclass(frozen=True)
class EvalPreprocessing:
    """Preprocessing of evaluation, prediction and publication."""

    image_size: int
    """Side of the center crop, in pixels."""
    resize_size: int
    """Short side before the crop, in pixels."""
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = imagenet.MEAN
    std: tuple[float, float, float] = imagenet.STD
    """Per channel, for RGB values from 0 to 1."""

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "EvalPreprocessing":
        size = recipe.eval_size
        return cls(size, resize_size_for(size, recipe.eval_crop_ratio), recipe.eval_interpolation)

    def at(self, image_size: int) -> "EvalPreprocessing":
        """Return the preprocessing for another image size, with the same ratio of crop and image."""
        return replace(self, image_size=image_size, resize_size=image_size * self.resize_size // self.image_size)

    def crop(self, image: Tensor) -> Tensor:
        """Resize the short side of (3, H, W) uint8, antialiased, then crop the center square, (3, S, S)."""
        height, width = image.shape[-2:]
        longest = MAX_ASPECT_RATIO * min(height, width)
        if max(height, width) > longest:  # a line of a million pixels, enlarged, would fill the memory
            image = F.center_crop(image, [min(height, longest), min(width, longest)])
        resized = F.resize(image, [self.resize_size], InterpolationMode(self.interpolation), antialias=True)
        return F.center_crop(resized, [self.image_size])

    def crop_all(self, images: Sequence[Tensor], samples: Sequence[Sample], size: int) -> Iterator[Tensor]:
        """Crop each image: a Crop for the loader."""
        return map(self.crop, images)

    def square(self, encoded: np.ndarray) -> np.ndarray:
        """Decode and crop an image for a plot, (S, S, 3) uint8."""
        return self.crop(decode(encoded)).permute(1, 2, 0).numpy()
