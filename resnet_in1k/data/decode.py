"""One encoded image to a uint8 tensor; and what happens to an image that cannot be read."""

import contextlib
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
from resnet_in1k.utils.errors import ProcessError
from resnet_in1k.utils.validation import OnBadImage

MAX_PIXELS = 178_956_970
"""Largest image that is decoded (half a gigabyte of RGB): Pillow's own limit for a decompression bomb."""
IfBad = Literal[OnBadImage, "blank", "blank_on_any_error"]
"""What a loader does with an image that cannot be decoded: `fail`; `skip` to the next image of the source that can be
decoded; `blank`: zeros, which evaluation counts as wrong. A file that its disk cannot read fails in all of these;
`blank_on_any_error`, for prediction, makes it blank, too."""


def decode(encoded: np.ndarray) -> torch.Tensor:
    """Decode an image of any format, (n,) uint8, to (3, H, W) uint8 RGB. Transparency is dropped.

    The EXIF orientation is applied, if the image has one: cameras store photographs as the sensor was held.

    Raises:
        ValueError: with the decoder's reason; and for more than MAX_PIXELS, by the header alone.
    """
    size = _jpeg_size(encoded)
    if size is None:
        return _decode_with_pillow(encoded)
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels; the limit is {MAX_PIXELS:,}")
    try:
        # The fastest JPEG decoder, and equal to Pillow bit for bit. torchvision's PNG decoder is not used: it ends the
        # process at a damaged file.
        return decode_jpeg(torch.from_numpy(encoded), mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError):
        return _decode_with_pillow(encoded)


def _jpeg_size(encoded: np.ndarray) -> tuple[int, int] | None:
    """(width, height) from a JPEG's header; None for another format or a truncated header."""
    # Pillow reads the size, too, but takes 100 µs, a tenth of the decoding time. This takes 5 µs.
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
            height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
            return width, height
        else:  # any other segment; its length counts all but the marker
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _decode_with_pillow(encoded: np.ndarray) -> torch.Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unused tags; an image that cannot be read is an error
            with Image.open(io.BytesIO(encoded.tobytes()), formats=_pillow_formats()) as image:
                if image.mode.startswith("I;16"):  # Pillow's own conversion would clip everything above 255
                    image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
                if image.mode in ("I", "F"):
                    raise ValueError(f"its pixels are numbers without a stated range (mode {image.mode})")
                with contextlib.suppress(Exception):  # a damaged tag; the pixels may be intact
                    image = ImageOps.exif_transpose(image)
                return F.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise all kinds of errors for damaged files
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(reason or type(error).__name__) from None


@functools.cache
def _pillow_formats() -> list[str]:
    Image.init()
    # Not all of Pillow's formats: some, such as EPS, are programs that an interpreter would execute.
    return [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "MPO") if name in Image.OPEN]


def read_image(
    source: Source, index: int, if_bad: IfBad, bad_images: dict[int, str]
) -> tuple[int, torch.Tensor | None]:
    """Read and decode the image at `index`; add the reasons of images that cannot be decoded to `bad_images`.

    The result depends on the files alone, so it is the same in every epoch, process and resumed run.

    Returns:
        The index of the image or of its replacement, and (3, H, W) uint8; None for a blank image.

    Raises:
        ProcessError: if the storage fails, more images in a row are corrupt than may be replaced, or, if `if_bad` is
            "fail", for an image that cannot be decoded.
    """
    num_replacements = max_bad_images(len(source)) if if_bad == "skip" else 0
    for candidate in range(index, index + num_replacements + 1):
        candidate %= len(source)
        try:
            return candidate, decode(files.retry_once(functools.partial(source.read, candidate)))
        except OSError as error:  # the storage, not the image, which may be readable in the next epoch
            reason = error.strerror or str(error)
            if if_bad != "blank_on_any_error":
                raise ProcessError(f"{source.image_name(candidate)} cannot be read from its disk: {reason}") from None
            bad_images[candidate] = reason
        except ValueError as error:
            bad_images[candidate] = str(error)
    if if_bad == "fail":
        raise ProcessError(
            f"{source.image_name(index)} cannot be read as an image ({bad_images[index]}); replace or remove the file, "
            "or train without it by --on-bad-image skip"
        )
    if if_bad == "skip":
        raise ProcessError(too_many_bad_images(bad_images, source))
    return index, None


def max_bad_images(num_images: int) -> int:
    """Number of training images that may be replaced: 0.1%."""
    return num_images // 1000


def too_many_bad_images(bad_images: Collection[int], source: Source) -> str:
    first = source.image_name(min(bad_images))
    return (
        f"{len(bad_images)} of {len(source):,} training images cannot be read ({first}, …); --on-bad-image skip "
        "replaces at most 0.1%; repair or remove the others"
    )
