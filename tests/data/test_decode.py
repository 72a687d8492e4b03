"""Decoding, against Pillow; damaged and hostile files."""

import io
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.images import encoded
from helpers.processes import ROOT
from PIL import Image, ImageOps

from resnet_in1k.data.decode import decode


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("RGB", {"format": "JPEG"}),
        ("RGB", {"format": "JPEG", "progressive": True}),
        ("L", {"format": "JPEG"}),
        ("CMYK", {"format": "JPEG"}),
        ("RGB", {"format": "PNG"}),
        ("RGBA", {"format": "PNG"}),
        ("P", {"format": "PNG"}),
        ("L", {"format": "PNG"}),
        ("RGB", {"format": "WEBP"}),
        ("P", {"format": "GIF"}),
        ("RGB", {"format": "BMP"}),
        ("RGB", {"format": "TIFF"}),
    ],
)
def test_decode_agrees_with_pillow(photographs: list[np.ndarray], mode: str, how: dict):
    data = encoded(Image.fromarray(photographs[0]).convert(mode), **how)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = decode(data)
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_images_keep_their_upper_eight_bits(kind: str):
    """Pillow's own conversion would make all that exceeds 255 white."""
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 7
    image = decode(encoded(Image.fromarray(values), format=kind))
    for channel in image:
        assert np.array_equal(channel.numpy(), np.arange(256, dtype=np.uint8).reshape(16, 16))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparency_of_a_palette_is_dropped(photographs: list[np.ndarray], kind: str):
    data = encoded(Image.fromarray(photographs[0]).quantize(16), format=kind, transparency=3)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3]
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), expected)


def test_an_animation_gives_its_first_frame(photographs: list[np.ndarray]):
    frames = [Image.fromarray(photograph).convert("P") for photograph in photographs]
    data = encoded(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 5000])
def test_broken_exif_is_ignored(photographs: list[np.ndarray], exif: bytes):
    picture = Image.fromarray(photographs[0])
    plain, broken = encoded(picture, format="JPEG"), encoded(picture, format="JPEG", exif=exif)
    assert len(broken) >= len(plain) + len(exif)
    assert torch.equal(decode(plain), decode(broken))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_upright(photographs: list[np.ndarray], orientation: int, format: str):
    """Against Pillow, and by hand: a camera held upright (6) stores its top at the right."""
    upright = Image.fromarray(photographs[0][:200, :300])
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encoded(upright, format=format, exif=exif, **lossless)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    decoded = decode(data).permute(1, 2, 0).numpy()
    assert np.array_equal(decoded, expected)
    if orientation == 6 and format != "TIFF":  # which Pillow turns when it reads it
        stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decoded, np.rot90(stored, k=-1))


@pytest.mark.slow
def test_any_damaged_byte_gives_an_image_or_a_value_error(photographs: list[np.ndarray], tmp_path: Path):
    """In a process of its own: torchvision's PNG decoder would end it."""
    for kind in ("PNG", "WEBP", "GIF", "JPEG", "TIFF", "BMP"):
        Image.fromarray(photographs[0][:64, :64]).save(tmp_path / kind, format=kind)
    code = """
import pathlib, sys
import numpy as np
from resnet_in1k.data.decode import decode
generator = np.random.default_rng(0)
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    data = np.fromfile(file, dtype=np.uint8)
    for place in generator.integers(0, len(data), 100):
        damaged = data.copy()
        damaged[place] ^= 1 << generator.integers(8)
        try:
            assert decode(damaged).shape[0] == 3
        except ValueError as error:
            assert str(error)
    print(file.name)
"""
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.split()) == (0, ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])


@pytest.mark.parametrize("cut", [0, 1, 3, 200])
def test_truncated_files_are_a_value_error_with_a_reason(photographs: list[np.ndarray], cut: int):
    with pytest.raises(ValueError, match=r"\w{4}"):
        decode(encoded(Image.fromarray(photographs[0]), format="JPEG")[:cut])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
"""Which Pillow would have another program run."""


@pytest.mark.parametrize("data", [b"<html>404 not found</html>", POSTSCRIPT], ids=["HTML", "PostScript"])
def test_other_formats_are_a_value_error(data: bytes):
    with pytest.raises(ValueError, match="no known image format"):
        decode(np.frombuffer(bytearray(data), dtype=np.uint8))


def test_pixels_without_a_stated_range_are_a_value_error():
    with pytest.raises(ValueError, match="its pixels are numbers without a stated range"):
        decode(encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), format="TIFF"))


def overwritten(data: np.ndarray, place: int, *sides: bytes) -> np.ndarray:
    """The same file, except for the width and height in its header."""
    changed = data.copy()
    new = np.frombuffer(b"".join(sides), dtype=np.uint8)
    changed[place : place + len(new)] = new
    return changed


def bomb(kind: str, photograph: np.ndarray) -> np.ndarray:
    """A small file whose header claims billions of pixels."""
    data = encoded(Image.fromarray(photograph), format=kind.split()[0])
    if kind == "PNG":
        data = overwritten(data, 16, (60_000).to_bytes(4, "big"), (50_000).to_bytes(4, "big"))
        return overwritten(data, 29, zlib.crc32(data[12:29].tobytes()).to_bytes(4, "big"))
    if kind.startswith("JPEG"):
        frame = data.tobytes().index(b"\xff\xc0")
        data = overwritten(data, frame + 5, b"\xff\xdc", b"\xff\xdc")
        if kind == "JPEG behind a marker without a segment":
            # A parser that takes what follows TEM, FF E0, for a length jumps over the true header to a small one.
            small = encoded(Image.fromarray(photograph[:8, :8]), format="JPEG").tobytes()[2:]
            rest = data.tobytes()[2:].ljust(0xFFE0, b"\0")[:0xFFE0]
            return np.frombuffer(b"\xff\xd8\xff\x01" + rest + small, dtype=np.uint8)
        return data
    if kind == "GIF":
        return overwritten(data, 6, b"\xff\xff", b"\xff\xff")
    return overwritten(data, 18, (60_000).to_bytes(4, "little"), (50_000).to_bytes(4, "little"))


@pytest.mark.parametrize("kind", ["JPEG", "JPEG behind a marker without a segment", "PNG", "GIF", "BMP"])
def test_a_decompression_bomb_is_refused_from_its_header(photographs: list[np.ndarray], kind: str):
    """With the address space bounded to little more than what is in use: its pixels would take 8 GB."""
    data = bomb(kind, photographs[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (256 << 20), before[1]))
    try:
        with pytest.raises(ValueError, match=r"pixels.*178[,9]"):
            decode(data)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
