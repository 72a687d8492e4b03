"""One encoded file to one uint8 square: decode, then the crop of training or of evaluation."""

import io

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import RandomResizedCrop

from resnet_in1k import randomness
from resnet_in1k.randomness import Stream

CROP_RATIO = (3 / 4, 4 / 3)
"""Aspect ratios of training crops, https://arxiv.org/abs/1409.4842."""


def decode(encoded: np.ndarray) -> torch.Tensor:
    """Any encoded image, (n,) uint8, as (3, H, W) uint8 RGB.

    torchvision's decoder is the fastest and agrees with Pillow bit for bit; Pillow reads what it does not know
    (BMP, TIFF).

    Raises:
        ValueError: with the decoder's reason, if neither can read it.
    """
    try:
        image = decode_image(torch.from_numpy(encoded), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        return _decode_with_pillow(encoded)
    if image.ndim == 4:  # an animation: its first frame, as Pillow gives it
        image = image[0]
    return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image


def _decode_with_pillow(encoded: np.ndarray) -> torch.Tensor:
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            return F.pil_to_tensor(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(reason) from None


SIDES = ("top", "left", "height", "width")


class TrainTransform:
    """Random resized crop to (3, S, S) uint8, drawn for (seed, epoch, index) (https://arxiv.org/abs/1409.4842)."""

    def __init__(self, *, image_size: int, crop_scale_min: float, seed: int):
        self._crop = RandomResizedCrop(image_size, scale=(crop_scale_min, 1.0), ratio=CROP_RATIO)
        self._size, self._seed = [image_size, image_size], seed

    def __call__(self, image: torch.Tensor, epoch: int, index: int) -> torch.Tensor:
        randomness.key_global_generator(self._seed, Stream.CROP, epoch, index)
        where = self._crop.make_params([image])
        # The transform's own call comes to the same, through layers that cost 40 µs an image.
        return F.resized_crop_image(image, *(where[side] for side in SIDES), self._size, antialias=True)


class EvalTransform:
    """Short side to `resize_size` (bilinear, antialiased), then the centre `image_size` square, (3, S, S) uint8."""

    def __init__(self, *, image_size: int, resize_size: int):
        self._image_size, self._resize_size = image_size, resize_size

    def __call__(self, image: torch.Tensor, epoch: int, index: int) -> torch.Tensor:
        resized = F.resize(image, [self._resize_size], antialias=True)
        return F.center_crop(resized, [self._image_size])
