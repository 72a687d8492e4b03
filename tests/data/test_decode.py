"""Decoding, against Pillow; damaged and hostile files."""

import contextlib
import io
import multiprocessing
import os
import resource
import struct
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

from resnet_in1k.data.decode import decode, wide_bits

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


def tiff_with_tags(endian: str, tags: dict[int, tuple[int, int]], pixels: bytes = b"") -> bytes:
    """A TIFF file, or EXIF's content, with tags of one value, (type, value); `pixels` are its only strip."""
    head = (b"MM\0*" if endian == ">" else b"II*\0") + struct.pack(endian + "IH", 8, len(tags))
    place = len(head) + 12 * len(tags) + 4
    for tag, (kind, value) in sorted(tags.items()):
        number = place if tag == 273 else value
        packed = {1: bytes([number % 256]), 3: struct.pack(endian + "H", number), 4: struct.pack(endian + "I", number)}
        head += struct.pack(endian + "HHI", tag, kind, 1) + packed[kind].ljust(4, b"\0")
    return head + bytes(4) + pixels


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>%s</x:xmpmeta>"
BEFORE = {
    "nothing": b"",
    "XMP": segment(0xE1, XMP % b""),
    "another APP1": segment(0xE1, b"FLIR\0\1"),
    "a comment and fill bytes": segment(0xFE, b"text") + b"\xff\xff",
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 7, 9])
def test_an_orientation_is_found_wherever_pillow_finds_it(photographs: list[np.ndarray], before: str, orientation: int):
    """In EXIF of either byte order and of all whole numbers, or in XMP alone; before or after the frame header."""
    plain = encoded(Image.fromarray(photographs[0][:40, :60]), format="JPEG").tobytes()
    exif = [
        b"Exif\0\0" + tiff_with_tags(endian, {0x0112: (kind, orientation)}) for endian in "<>" for kind in (1, 3, 4)
    ]
    attribute, element = b'<r tiff:Orientation="%d"/>', b"<tiff:Orientation>%d</tiff:Orientation>"
    in_xmp = [XMP % (text % orientation) for text in (attribute, element)]
    without_tag = segment(0xE1, b"Exif\0\0" + tiff_with_tags("<", {0x0100: (3, 60)})) + segment(0xE1, in_xmp[0])
    for content in (*(segment(0xE1, each) for each in (*exif, *in_xmp)), without_tag):
        for place in (2, plain.index(b"\xff\xda")):
            data = plain[:place] + BEFORE[before] + content + plain[place:]
            expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
            found = decode(np.frombuffer(bytearray(data), dtype=np.uint8))
            assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def png(values: np.ndarray, significant_bits: int = 0) -> bytes:
    """A PNG of 16 bits a channel, (H, W) or (H, W, 3 or 4)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    channels = 1 if values.ndim == 2 else values.shape[2]
    kind = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    stated = chunk(b"sBIT", bytes([significant_bits] * channels)) if significant_bits else b""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", header) + stated + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def gray_tiff(values: np.ndarray, endian: str, **more: int) -> bytes:
    height, width = values.shape
    tags = {256: (3, width), 257: (3, height), 258: (3, 16), 259: (3, 1), 262: (3, 1), 273: (4, 0), 277: (3, 1)}
    tags |= {278: (3, height), 279: (4, 2 * values.size), **{int(tag[1:]): (3, value) for tag, value in more.items()}}
    return tiff_with_tags(endian, tags, values.astype(endian + "u2").tobytes())


RAMP = np.arange(48, dtype=np.uint16).reshape(6, 8)


@pytest.mark.parametrize(
    ("data", "bits"),
    [
        (png(RAMP * 85), 12),  # up to 3,995
        (png(RAMP * 20), 10),
        (png(RAMP * 20, significant_bits=12), 12),
        (png(RAMP * 1000, significant_bits=12), 16),  # the upper 12 bits
        (png(np.dstack([RAMP, RAMP * 85, RAMP * 2])), 12),
        (png(np.dstack([RAMP, RAMP * 85, RAMP * 2, RAMP])), 12),
        (gray_tiff(RAMP * 85, "<"), 12),
        (gray_tiff(RAMP * 85, ">"), 12),
        (gray_tiff(RAMP * 20, ">", t281=4095), 12),  # MaxSampleValue
        (b"P5 8 6 4095\n" + (RAMP * 85).astype(">u2").tobytes(), 16),  # Pillow scales by the stated maximum
        (png(RAMP * 2), 8),
    ],
)
def test_values_of_fewer_than_sixteen_bits_are_scaled_by_their_range(data: bytes, bits: int):
    """Their upper eight bits are black."""
    array = np.frombuffer(bytearray(data), dtype=np.uint8)
    assert wide_bits(array) == bits
    green = decode(array)[1].numpy().astype(int)
    if data.startswith(b"P5"):
        assert np.abs(green - RAMP.astype(int) * 85 * 255 / 4095).max() < 1.5
    else:
        steps = {12: (85, 20), 10: (20,), 16: (1000,), 8: (2,)}[bits]
        assert any(np.array_equal(green, (RAMP.astype(int) * step) >> (bits - 8)) for step in steps)


def test_a_wide_image_is_turned_upright():
    data = np.frombuffer(bytearray(gray_tiff(RAMP * 85, ">", t274=6)), dtype=np.uint8)
    assert np.array_equal(decode(data)[0].numpy(), np.rot90(RAMP.astype(int) * 85 >> 4, -1))


def test_a_preview_is_not_taken_for_the_photograph():
    """Cameras' raw files are TIFF files that begin with one."""
    raw = np.frombuffer(bytearray(gray_tiff(RAMP, "<", t254=1)), dtype=np.uint8)
    with pytest.raises(ValueError, match="its first picture is a preview"):
        decode(raw)


HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


@pytest.mark.parametrize(("head", "name"), [(HEIC, "HEIC"), (b"\xff\x0a" + bytes(40), "JPEG XL")])
def test_a_photograph_of_an_unknown_format_is_named_with_a_cure(head: bytes, name: str):
    """Whatever the suffix of the file."""
    with pytest.raises(ValueError, match=f"^{name} is not decoded; convert to JPEG, or for HEIC `pip install pillow-"):
        decode(np.frombuffer(bytearray(head), dtype=np.uint8))


STAND_IN = """
from PIL import Image, ImageFile

class HeifImageFile(ImageFile.ImageFile):
    format, format_description = "HEIF", "stand-in"

    def _open(self):
        self._size, self._mode = (8, 6), "RGB"
        self.tile = []

    def load(self):
        self.im = Image.new("RGB", (8, 6), (9, 8, 7)).im
        return Image.Image.load(self)

def register_heif_opener():
    Image.register_open("HEIF", HeifImageFile, lambda head: head[4:12] == b"ftypheic")
    Image.register_extensions("HEIF", [".heic", ".heif"])
"""


@pytest.mark.slow
def test_heic_is_read_if_pillow_heif_is_installed(tmp_path: Path):
    """In a process of its own, with a stand-in for the library: listed, and decoded."""
    (tmp_path / "pillow_heif.py").write_text(STAND_IN)
    for name in ("train/cat/a.heic", "train/cat/b", "train/dog/c.HEIC", "val/cat/a.heic", "val/dog/b.heif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(HEIC)
    code = (
        "from resnet_in1k.data.registry import open_train_and_val; from resnet_in1k.data.decode import decode;"
        "train, val = open_train_and_val('.');"
        "print(len(train), len(val), train.note, [decode(train.read(i)).flatten(1)[:, 0].tolist() for i in range(3)])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout == f"3 2  {[[9, 8, 7]] * 3}\n", run.stderr


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
