"""Smaller copies of images: less to read and to decode, for the same crops."""

import io
from dataclasses import dataclass

import numpy as np
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from resnet_in1k.data.decode import decode

JPEG_QUALITY, JPEG_SUBSAMPLING = 90, "4:2:0"
"""As ImageNet's own files mostly have it; FFCV's published recipes are trained on copies of this quality."""


@dataclass(frozen=True)
class Resizer:
    """An encoded image to a JPEG whose shorter side has `shorter_side` pixels; a smaller image stays as it is.

    Decoded as training does it, so turned upright by its EXIF orientation; resized bicubically, antialiased.
    """

    shorter_side: int

    def __call__(self, encoded: bytes) -> bytes:
        """Raises ValueError if it cannot be decoded."""
        image = decode(np.frombuffer(bytearray(encoded), dtype=np.uint8))
        height, width = image.shape[1:]
        if min(height, width) <= self.shorter_side:
            return encoded
        resized = F.resize(image, [self.shorter_side], InterpolationMode.BICUBIC, antialias=True)
        file = io.BytesIO()
        picture = Image.fromarray(resized.permute(1, 2, 0).numpy())
        picture.save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=JPEG_SUBSAMPLING, optimize=True)
        return file.getvalue()
