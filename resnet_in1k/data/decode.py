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
from PIL import ExifTags, Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from resnet_in1k.data import formats
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
    header = _jpeg_header(encoded)
    if header is None:
        return _decode_with_pillow(encoded)
    width, height, has_metadata = header
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels; the limit is {MAX_PIXELS:,}")
    try:
        # The fastest JPEG decoder, and equal to Pillow bit for bit. torchvision's PNG decoder is not used: it ends the
        # process at a damaged file.
        image = decode_jpeg(torch.from_numpy(encoded), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        return _decode_with_pillow(encoded)
    return _turn_upright(image, encoded) if has_metadata else image


def _jpeg_header(encoded: np.ndarray) -> tuple[int, int, bool] | None:
    """Return width, height and whether there is an APP1 segment; None for another format or a truncated header."""
    # Pillow reads the size, too, but takes 100 µs, a tenth of the decoding time. This takes 5 µs.
    data = memoryview(encoded)
    if data[:2] != b"\xff\xd8":
        return None
    place, size, has_metadata = 2, None, False
    while place + 9 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:  # until the first scan
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            place += 2
        else:
            if size is None and 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # ITU-T T.81 table B.1
                height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
                size = width, height
            has_metadata = has_metadata or marker == 0xE1
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")  # the length counts all but the marker
    return (*size, has_metadata) if size else None


def _turn_upright(image: torch.Tensor, encoded: np.ndarray) -> torch.Tensor:
    """Apply the orientation that Pillow finds in EXIF or XMP: torchvision reads only the first APP1 segment."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # a damaged tag; the pixels may be intact
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(encoded.tobytes()), formats=["JPEG"]) as file:
            if file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                # By Pillow, which takes a tenth of the time of torch's flip.
                image = F.pil_to_tensor(_transpose_like(file, Image.fromarray(image.permute(1, 2, 0).numpy())))
    return image


def _transpose_like(file: Image.Image, pixels: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):
        pixels.getexif()[ExifTags.Base.Orientation] = file.getexif().get(ExifTags.Base.Orientation, 1)
        return ImageOps.exif_transpose(pixels)
    return pixels


def _open_with_pillow(encoded: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(encoded.tobytes()), formats=formats.image_formats())


def _decode_with_pillow(encoded: np.ndarray) -> torch.Tensor:
    try:
        with warnings.catch_warnings(), _open_with_pillow(encoded) as image:
            warnings.simplefilter("ignore")  # about unused tags; an image that cannot be read is an error
            if int(np.max(getattr(image, "tag_v2", {}).get(254, 0))) & 1:  # NewSubfileType
                raise ValueError(f"its first picture is a preview, as in a camera's raw file; {formats.ADVICE}")
            pixels = image
            if wide := _wide_values(image, encoded):
                pixels = Image.fromarray((wide[0] >> (wide[1] - 8)).astype(np.uint8))
            if pixels.mode in ("I", "F"):
                raise ValueError(f"its pixels are numbers without a stated range (mode {pixels.mode})")
            return F.pil_to_tensor(_transpose_like(image, pixels).convert("RGB"))
    except Exception as error:  # Pillow's plugins raise all kinds of errors for damaged files
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            kind = formats.format_by_content(encoded[:16].tobytes())
            reason = f"{kind} is not decoded; {formats.ADVICE}" if kind else "no known image format"
        raise ValueError(reason) from None


def _wide_values(image: Image.Image, encoded: np.ndarray) -> tuple[np.ndarray, int] | None:
    """Decode; return the values of an image with 16 bits a channel, (H, W) or (H, W, 3) int64, and the number of bits
    that the file states for them or, if they do not fit, that the largest one has; None for other images."""
    arguments = image.tile[0][3] if image.tile else ""
    raw_mode = str(arguments[0] if isinstance(arguments, tuple) else arguments)  # such as RGB;16B
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
    elif image.mode in ("RGB", "RGBA") and ";16" in raw_mode:
        # Pillow keeps the upper bytes of a color image. Read in the other byte order, these are the lower ones.
        swapped = raw_mode[:-1] + ("L" if raw_mode.endswith("B") else "B")
        swapped = (swapped, *arguments[1:]) if isinstance(arguments, tuple) else swapped
        with _open_with_pillow(encoded) as again:
            again.tile = [tile._replace(args=swapped) for tile in again.tile]
            high, low = (np.asarray(each)[..., :3].astype(np.int64) for each in (image, again))
        values = (high << 8) + low
    else:
        return None
    used, stated = max(int(values.max()).bit_length(), 8), 0
    if image.format == "PNG":
        _, found, after = encoded.tobytes().partition(b"IDAT")[0].partition(b"sBIT")
        stated = after[0] if found else 0
    elif image.format == "PPM":
        stated = 16  # Pillow has scaled the values by the file's maximum
    elif image.format == "TIFF":
        stated = int(np.max(image.tag_v2.get(281, 0))).bit_length()  # MaxSampleValue
    return values, stated if used <= stated <= 16 else used


def wide_bits(encoded: np.ndarray) -> int:
    """Return the bits of its values that an image with 16 bits a channel is scaled by; 0 for other images."""
    with warnings.catch_warnings(), contextlib.suppress(Exception), _open_with_pillow(encoded) as image:
        warnings.simplefilter("ignore")
        if image.format != "JPEG" and (wide := _wide_values(image, encoded)):
            return wide[1]
    return 0


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
    """Number of training images that may be replaced: 0.1%, and at least one."""
    return max(1, num_images // 1000)


def too_many_bad_images(bad_images: Collection[int], source: Source) -> str:
    first = source.image_name(min(bad_images))
    return (
        f"{len(bad_images)} of {len(source):,} training images cannot be read ({first}, …); --on-bad-image skip "
        f"replaces at most 0.1%, here {max_bad_images(len(source))}; repair or remove the others"
    )
