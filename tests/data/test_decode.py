"""Decoding, against Pillow; damaged and hostile files."""

import contextlib
import io
import multiprocessing
import resource
import zlib

import numpy as np
import psutil
import pytest
import torch
from helpers.images import encoded
from PIL import Image, ImageOps

from resnet_in1k.data.decode import decode

MODES = {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "RGBA", "P", "L"], "GIF": ["P"]}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_decode_agrees_with_pillow(photographs: list[np.ndarray], format: str):
    for mode in MODES.get(format, ["RGB"]):
        data = encoded(Image.fromarray(photographs[0]).convert(mode), format=format)
        image = decode(data)
        assert image.dtype == torch.uint8
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


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


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 5000])
def test_broken_exif_is_ignored(photographs: list[np.ndarray], exif: bytes):
    picture = Image.fromarray(photographs[0])
    plain, broken = encoded(picture, format="JPEG"), encoded(picture, format="JPEG", exif=exif)
    assert len(broken) >= len(plain) + len(exif)
    assert torch.equal(decode(plain), decode(broken))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_upright(photographs: list[np.ndarray], orientation: int, format: str):
    upright = Image.fromarray(photographs[0][:200, :300])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(upright, format=format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), expected)


def decode_damaged(whole: np.ndarray) -> None:
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole), 100):
        damaged = whole.copy()
        damaged[place] ^= 1 << generator.integers(8)
        with contextlib.suppress(ValueError):
            assert decode(damaged).shape[0] == 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "JPEG", "TIFF", "BMP"])
def test_any_damaged_byte_gives_an_image_or_a_value_error(photographs: list[np.ndarray], kind: str):
    """In a process of its own: torchvision's PNG decoder would end it."""
    whole = encoded(Image.fromarray(photographs[0][:64, :64]), format=kind)
    process = multiprocessing.get_context("fork").Process(target=decode_damaged, args=(whole,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("cut", [0, 1, 3, 200])
def test_truncated_files_are_a_value_error_with_a_reason(photographs: list[np.ndarray], cut: int):
    with pytest.raises(ValueError, match=r"\w{4}"):
        decode(encoded(Image.fromarray(photographs[0]), format="JPEG")[:cut])


def test_what_is_no_rgb_image_is_a_value_error():
    """Pillow would have another program run PostScript."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="no known image format"):
        decode(np.frombuffer(bytearray(postscript), dtype=np.uint8))
    with pytest.raises(ValueError, match="its pixels are numbers without a stated range"):
        decode(encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), format="TIFF"))


def with_bytes(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def bomb(kind: str, photograph: np.ndarray) -> bytes:
    """A small file whose header claims billions of pixels."""
    data = encoded(Image.fromarray(photograph), format=kind.split()[0]).tobytes()
    if kind == "PNG":
        data = with_bytes(data, 16, (60_000).to_bytes(4, "big") + (50_000).to_bytes(4, "big"))
        return with_bytes(data, 29, zlib.crc32(data[12:29]).to_bytes(4, "big"))
    data = with_bytes(data, data.index(b"\xff\xc0") + 5, b"\xff\xdc\xff\xdc")
    if kind == "JPEG":
        return data
    # A parser that takes what follows TEM, FF E0, for a length jumps over the true header to a small one.
    small = encoded(Image.fromarray(photograph[:8, :8]), format="JPEG").tobytes()[2:]
    return b"\xff\xd8\xff\x01" + data[2:].ljust(0xFFE0, b"\0")[:0xFFE0] + small


@pytest.mark.parametrize("kind", ["JPEG", "JPEG behind a marker without a segment", "PNG"])
def test_a_decompression_bomb_is_refused_from_its_header(photographs: list[np.ndarray], kind: str):
    """With the address space bounded to little more than what is in use: its pixels would take 8 GB."""
    data = np.frombuffer(bytearray(bomb(kind, photographs[0])), dtype=np.uint8)
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (256 << 20), before[1]))
    try:
        with pytest.raises(ValueError, match=r"pixels.*178[,9]"):
            decode(data)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
