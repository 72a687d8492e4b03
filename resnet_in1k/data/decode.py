"""One encoded image to a uint8 tensor."""

import functools
import io
import warnings
from collections.abc import Collection
from typing import Literal

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from resnet_in1k.data.dataset import Source
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import BadImageError, ProcessError

MAX_PIXELS = 178_956_970
"""An image of more pixels, half a gigabyte once decoded, is refused: Pillow's own limit for a decompression bomb."""


def decode(encoded: np.ndarray) -> torch.Tensor:
    """Any encoded image, (n,) uint8, as (3, H, W) uint8 RGB; transparency is dropped.

    It is turned upright as its EXIF orientation says, if it has one: cameras and phones store photographs as the sensor
    lay. torchvision's and timm's own loaders ignore that, which matters to few of ImageNet's images.

    torchvision's JPEG decoder is the fastest and agrees with Pillow bit for bit. All else is Pillow's: torchvision's
    PNG decoder ends the process at a damaged file, and of an animation it decodes every frame.

    Raises:
        ValueError: with the decoder's reason, if it cannot be read; from the header, if it has over MAX_PIXELS.
    """
    size = _jpeg_size(encoded)
    if size is None:
        return _decode_with_pillow(encoded)
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels, more than the {MAX_PIXELS:,} that are decoded")
    try:
        return decode_jpeg(torch.from_numpy(encoded), mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError):
        return _decode_with_pillow(encoded)


def _jpeg_size(encoded: np.ndarray) -> tuple[int, int] | None:
    """(width, height) from the header; None for another format or a header that is cut off.

    Pillow reads it too, but takes 100 µs, a tenth of what decoding takes; this takes 5.
    """
    data = memoryview(encoded)
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            place += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header, ITU-T T.81 table B.1
            return int.from_bytes(data[place + 7 : place + 9], "big"), int.from_bytes(
                data[place + 5 : place + 7], "big"
            )
        else:  # another segment: its length counts all but the marker
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _decode_with_pillow(encoded: np.ndarray) -> torch.Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unused tags; an image that cannot be read is an error
            with Image.open(io.BytesIO(encoded.tobytes()), formats=_pillow_formats()) as image:
                if image.mode.startswith("I;16"):  # Pillow would cut off what exceeds 255
                    image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
                if image.mode in ("I", "F"):
                    raise ValueError(f"its pixels are {image.mode}, numbers without a stated range")
                return F.pil_to_tensor(_upright(image).convert("RGB"))
    except Exception as error:  # its plugins raise all kinds of errors for damaged files
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(reason or type(error).__name__) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag says nothing; the image may be whole
        return image


@functools.cache
def _pillow_formats() -> list[str]:
    """Image formats only: others, such as EPS, are programs that an interpreter would have to run."""
    Image.init()
    return [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "MPO") if name in Image.OPEN]


OnBadImage = Literal["fail", "skip"]
"""What training does about an image that cannot be read."""
IfBad = Literal["fail", "replace", "blank", "blank_on_any_error"]
"""`replace`: by the next image of the source that can be decoded; `blank`: by zeros, to be counted as wrong. All fail
for a file that cannot be read from its disk, except the last, which is for prediction."""


def read_image(
    source: Source, index: int, if_bad: IfBad, bad_images: dict[int, str]
) -> tuple[int, torch.Tensor | None]:
    """The image at `index` or, to replace it, the next that can be decoded, with its index; None for a blank one.

    The result depends on the files alone, so it is the same in every epoch, process and resumed run. Each image that
    cannot be decoded is added to `bad_images`, with the decoder's reason.

    Raises:
        ProcessError: if the storage fails, or too many images in a row would be replaced.
        BadImageError: for an image that cannot be decoded, if `if_bad` is "fail".
    """
    at_most = max_bad_images(len(source)) if if_bad == "replace" else 0
    for candidate in range(index, index + at_most + 1):
        candidate %= len(source)
        try:
            return candidate, decode(files.retry_once(functools.partial(source.read, candidate)))
        except OSError as error:  # of the storage, not the image: it may be gone in the next epoch
            if if_bad == "blank_on_any_error":
                bad_images[candidate] = error.strerror or str(error)
                return index, None
            name = source.image_name(candidate)
            raise ProcessError(f"{name} cannot be read from its disk: {error.strerror or error}") from None
        except ValueError as error:
            bad_images[candidate] = str(error)
    if if_bad == "fail":
        raise BadImageError.about(source.image_name(index), bad_images[index])
    if if_bad == "replace":
        raise ProcessError(too_many_bad_images(bad_images, source))
    return index, None


def max_bad_images(num_images: int) -> int:
    """How many of so many training images may be replaced: 0.1 %."""
    return num_images // 1000


def too_many_bad_images(bad_images: Collection[int], source: Source) -> str:
    first = source.image_name(min(bad_images))
    return (
        f"{len(bad_images)} of {len(source):,} training images cannot be read ({first}, …), more than the 0.1 % that "
        "--on-bad-image skip replaces; repair or remove them"
    )
