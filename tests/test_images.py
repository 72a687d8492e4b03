import io

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image

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
