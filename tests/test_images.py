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
import torchvision.transforms as v1
from PIL import Image
from processes import ROOT

from resnet_in1k.images import EvalTransform, TrainTransform, decode
from resnet_in1k.randomness import Stream, key


def encoded(image: Image.Image, **how: object) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, **how)
    return np.frombuffer(bytearray(file.getvalue()), dtype=np.uint8)


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
def test_decode_agrees_with_pillow(photographs, mode: str, how: dict):
    data = encoded(Image.fromarray(photographs[0]).convert(mode), **how)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = decode(data)
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_sixteen_bit_png_keeps_its_upper_eight_bits():
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 7
    image = decode(encoded(Image.fromarray(values), format="PNG"))
    assert np.array_equal(image[0].numpy(), np.arange(256, dtype=np.uint8).reshape(16, 16))


def test_a_damaged_byte_anywhere_is_an_image_or_a_value_error(photographs, tmp_path: Path):
    """In a process of its own: torchvision's PNG decoder would end it."""
    for kind in ("PNG", "WEBP", "GIF", "JPEG", "TIFF", "BMP"):
        Image.fromarray(photographs[0][:64, :64]).save(tmp_path / kind, format=kind)
    code = """
import pathlib, sys
import numpy as np
from resnet_in1k.images import decode
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


def test_what_would_be_run_by_another_program_is_no_image():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="no known image format"):
        decode(np.frombuffer(bytearray(postscript), dtype=np.uint8))


def test_sixteen_bit_tiff_does_so_too():
    """Pillow's own conversion would make white of all that exceeds 255."""
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 7
    image = decode(encoded(Image.fromarray(values), format="TIFF"))
    assert np.array_equal(image[2].numpy(), np.arange(256, dtype=np.uint8).reshape(16, 16))


def test_palette_with_transparency(photographs):
    picture = Image.fromarray(photographs[0]).quantize(16)
    for how in ({"format": "PNG", "transparency": 3}, {"format": "GIF", "transparency": 3}):
        data = encoded(picture, **how)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3]
        assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 5000])
def test_broken_exif_does_not_matter(photographs, exif: bytes):
    picture = Image.fromarray(photographs[0])
    plain, broken = encoded(picture, format="JPEG"), encoded(picture, format="JPEG", exif=exif)
    assert len(broken) >= len(plain) + len(exif)
    assert torch.equal(decode(plain), decode(broken))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 700), (1, 1_000_000)])
def test_a_pixel_and_a_line_are_images_too(shape: tuple[int, int]):
    levels = (np.arange(shape[0] * shape[1]) * 255 // (shape[0] * shape[1])).astype(np.uint8)
    image = decode(encoded(Image.fromarray(levels.reshape(shape)), format="PNG"))
    assert image.shape == (3, *shape)
    train = TrainTransform(image_size=32, crop_scale_min=0.08, seed=0)(image, 1, 0)
    evaluation = EvalTransform(image_size=224, resize_size=256)(image, 1, 0)
    assert (train.shape, evaluation.shape) == ((3, 32, 32), (3, 224, 224))
    centre = int(image[0, shape[0] // 2, shape[1] // 2])
    assert abs(evaluation.float().mean().item() - centre) <= 2


def claim(data: np.ndarray, place: int, *sides: bytes) -> np.ndarray:
    """The same file, but for the width and height in its header."""
    bomb = data.copy()
    for number, side in enumerate(sides):
        start = place + number * len(side)
        bomb[start : start + len(side)] = np.frombuffer(side, dtype=np.uint8)
    return bomb


def bomb(kind: str, photograph: np.ndarray) -> np.ndarray:
    data = encoded(Image.fromarray(photograph), format=kind.split()[0])
    if kind == "PNG":
        data = claim(data, 16, (60_000).to_bytes(4, "big"), (50_000).to_bytes(4, "big"))
        data[29:33] = np.frombuffer(zlib.crc32(data[12:29].tobytes()).to_bytes(4, "big"), dtype=np.uint8)
        return data
    if kind.startswith("JPEG"):
        frame = data.tobytes().index(b"\xff\xc0")
        data = claim(data, frame + 5, b"\xff\xdc", b"\xff\xdc")
        if kind == "JPEG behind a marker that stands alone":
            # Whoever takes what follows TEM, FF E0, for a length jumps from it over the true header to a small one.
            small = encoded(Image.fromarray(photograph[:8, :8]), format="JPEG").tobytes()[2:]
            rest = data.tobytes()[2:].ljust(0xFFE0, b"\0")[:0xFFE0]
            return np.frombuffer(b"\xff\xd8\xff\x01" + rest + small, dtype=np.uint8)
        return data
    if kind == "GIF":
        return claim(data, 6, b"\xff\xff", b"\xff\xff")
    return claim(data, 18, (60_000).to_bytes(4, "little"), (50_000).to_bytes(4, "little"))


@pytest.mark.parametrize("kind", ["JPEG", "JPEG behind a marker that stands alone", "PNG", "GIF", "BMP"])
def test_a_decompression_bomb_is_refused_from_its_header(photographs, kind: str):
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


def test_numbers_without_a_range_are_no_image():
    with pytest.raises(ValueError, match="its pixels are F, numbers without a stated range"):
        decode(encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), format="TIFF"))


def test_an_animation_is_its_first_frame(photographs):
    frames = [Image.fromarray(photograph).convert("P") for photograph in photographs]
    data = encoded(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("cut", [0, 1, 3, 200])
def test_broken_files_are_a_value_error_with_a_reason(photographs, cut: int):
    data = encoded(Image.fromarray(photographs[0]), format="JPEG")[:cut]
    with pytest.raises(ValueError, match=r"\w{4}"):
        decode(data)
    with pytest.raises(ValueError, match="no known image format"):
        decode(np.frombuffer(bytearray(b"<html>404 not found</html>"), dtype=np.uint8))


@pytest.mark.parametrize("image_size", [64, 224])
def test_train_crop_is_torchvisions_on_pillow_images(photographs, image_size: int):
    """torchvision's older transforms on Pillow images draw the same crop from the same generator."""
    for index, photograph in enumerate(photographs):
        ours = TrainTransform(image_size=image_size, crop_scale_min=0.08, seed=5)(
            torch.from_numpy(photograph).permute(2, 0, 1), 3, index
        )
        torch.manual_seed(key(5, Stream.CROP, 3, index))
        theirs = v1.RandomResizedCrop(image_size)(Image.fromarray(photograph))
        assert ours.shape == (3, image_size, image_size)
        assert_close_levels(ours, theirs, at_most=1)


@pytest.mark.parametrize(("image_size", "resize_size"), [(224, 256), (64, 73), (300, 300)])
def test_eval_crop_is_torchvisions_on_pillow_images(photographs, image_size: int, resize_size: int):
    theirs = v1.Compose([v1.Resize(resize_size), v1.CenterCrop(image_size)])
    for photograph in (photographs[0], photographs[1].transpose(1, 0, 2), photographs[0][:50, :40]):
        ours = EvalTransform(image_size=image_size, resize_size=resize_size)(
            torch.from_numpy(np.ascontiguousarray(photograph)).permute(2, 0, 1), 0, 0
        )
        assert_close_levels(ours, theirs(Image.fromarray(np.ascontiguousarray(photograph))), at_most=1)


def test_crops_depend_on_seed_epoch_and_index_alone(photographs):
    image = torch.from_numpy(photographs[0]).permute(2, 0, 1)
    crop = TrainTransform(image_size=32, crop_scale_min=0.08, seed=1)
    first = crop(image, 1, 7)
    torch.rand(100)
    assert torch.equal(crop(image, 1, 7), first)
    assert not torch.equal(crop(image, 2, 7), first)
    assert not torch.equal(crop(image, 1, 8), first)
    assert not torch.equal(TrainTransform(image_size=32, crop_scale_min=0.08, seed=2)(image, 1, 7), first)


def assert_close_levels(ours: torch.Tensor, theirs: Image.Image, at_most: int) -> None:
    difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs, dtype=int))
    assert difference.max() <= at_most
