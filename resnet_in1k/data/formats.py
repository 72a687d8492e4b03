"""Files among images: formats that the decoder reads, formats that it does not, and leftovers of other programs."""

import contextlib
import functools
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from resnet_in1k.utils.format import shorten

LEFTOVERS = re.compile(
    r"\._.*|\.ipynb_checkpoints|@eaDir|#recycle|#snapshot|\$RECYCLE\.BIN|__MACOSX|lost\+found|"
    r"System Volume Information|(eh)?thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)
"""Names of what network storage, archives and operating systems leave among images."""
PHOTOGRAPHS = {".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".jxl": "JPEG XL", ".jp2": "JPEG 2000"}
PHOTOGRAPHS |= dict.fromkeys([".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2"], "camera raw")
"""Formats of photographs that are not decoded, by suffix; HEIC is, if pillow-heif is installed."""
ADVICE = "convert to JPEG, or for HEIC `pip install pillow-heif`"


@functools.cache
def image_formats() -> list[str]:
    """Return Pillow's names of the formats that are decoded."""
    Image.init()
    with contextlib.suppress(ImportError, OSError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    # Not all of Pillow's formats: some, such as EPS, are programs that an interpreter would execute.
    known = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "MPO", "HEIF")
    return [name for name in known if name in Image.OPEN]


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of the formats that are decoded. Other files are recognized by their header."""
    formats = image_formats()
    return tuple(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def is_image(path: Path) -> bool:
    """True for a file with an image's suffix or header."""
    if path.name.lower().endswith(image_suffixes()):
        return True
    if PHOTOGRAPHS.get(path.suffix.lower()) == "camera raw":  # a TIFF file; its first picture is a preview
        return False
    with warnings.catch_warnings(), contextlib.suppress(ValueError, SyntaxError, Image.DecompressionBombError):
        warnings.simplefilter("ignore")
        try:
            Image.open(path, formats=image_formats()).close()
        except OSError:
            return False
    return True  # also for a damaged image, which must be reported


def is_undecodable(name: str) -> bool:
    return Path(name).suffix.lower() in PHOTOGRAPHS


def describe_undecodable(names: Sequence[str]) -> str:
    kinds = Counter(PHOTOGRAPHS[Path(name).suffix.lower()] for name in names)
    numbers = ", ".join(f"{number:,} {kind}" for kind, number in kinds.items())
    return f"photographs that cannot be decoded ({numbers}): {shorten(names)}; {ADVICE}"


def format_by_content(head: bytes) -> str:
    """Return the format of a photograph that is not decoded, by its first bytes; "" for other files."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "HEIC"
    return "JPEG XL" if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) else ""
