"""Flip and rotation against torchvision's functionals; erasing against its RandomErasing."""

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms import v2

from resnet_in1k.augment.geometry import HorizontalFlip, RandomErasing, Rotation
from resnet_in1k.augment.normalize import normalize

TARGETS = torch.arange(96)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flip_is_torchvisions(images: torch.Tensor, dtype: torch.dtype):
    mirrored = torch.arange(len(images)) % 3 == 0
    expected = torch.stack([F.hflip(i) if m else i for i, m in zip(images, mirrored, strict=True)]).to(dtype)
    flipped, targets = HorizontalFlip(0.5).apply(images.to(dtype), TARGETS, mirrored.float().unsqueeze(1), None)
    assert torch.equal(flipped, expected)
    assert torch.equal(targets, TARGETS)


def test_share_of_mirrored_images_is_the_probability():
    for probability in (0.1, 0.5, 1.0):
        draws, _ = HorizontalFlip(probability).draw(torch.Generator().manual_seed(0), 20_000)
        assert abs(draws.mean() - probability) < 0.02


def test_rotation_is_torchvisions_but_for_ties_between_two_pixels(images: torch.Tensor):
    degrees = torch.empty(len(images), 1).uniform_(-180, 180, generator=torch.Generator().manual_seed(1))
    ours, targets = Rotation(180).apply(images.float(), TARGETS, degrees, None)
    theirs = torch.stack([F.rotate(i, float(d)) for i, d in zip(images, degrees, strict=True)])
    assert (ours != theirs).any(dim=1).float().mean() < 1e-4  # where the nearest pixel is a matter of rounding
    assert torch.equal(targets, TARGETS)


def test_angles_are_uniform_to_either_side():
    degrees, _ = Rotation(10).draw(torch.Generator().manual_seed(0), 20_000)
    assert -10 <= degrees.min() < -9.9
    assert 9.9 < degrees.max() <= 10
    assert abs(degrees.mean()) < 0.2
    assert abs(degrees.std() - 20 / 12**0.5) < 0.1


def test_rectangles_are_torchvisions_for_the_same_draw(images: torch.Tensor):
    """torchvision draws place and size in pixels, of which the shares follow."""
    torch.manual_seed(1)
    theirs = v2.RandomErasing(p=1.0)
    params = [theirs.make_params([image]) for image in images]
    assert all(each["v"] is not None for each in params)
    sides = torch.tensor([[each["h"], each["w"]] for each in params]) / 64
    places = torch.tensor([[each["i"], each["j"]] for each in params])
    corner = (places + 0.5) / (64 - sides * 64 + 1)
    ours, targets = RandomErasing(1.0).apply(images.float(), TARGETS, torch.cat([sides, corner], dim=1), None)
    expected = torch.stack(
        [theirs.transform(image, each) for image, each in zip(normalize(images), params, strict=True)]
    )
    torch.testing.assert_close(normalize(ours), expected, rtol=0, atol=1e-5)
    assert torch.equal(targets, TARGETS)


def test_rectangles_have_torchvisions_distribution():
    """Share of images erased, mean and spread of area and of the logarithm of the ratio, over 3,000 images of 64 px."""
    torch.manual_seed(0)
    number, blank = 3000, torch.full((1, 3, 64, 64), 255.0)
    theirs = [v2.RandomErasing(p=0.4)(torch.ones(1, 64, 64))[0] == 0 for _ in range(number)]
    operation = RandomErasing(0.4)
    drawn, _ = operation.draw(torch.Generator().manual_seed(0), number)
    erased, _ = operation.apply(blank.expand(number, -1, -1, -1), torch.arange(number), drawn, None)
    ours = [image[0] != 255 for image in erased]
    statistics = []
    for masks in (ours, theirs):
        sizes = [(mask.any(dim=1).sum(), mask.any(dim=0).sum()) for mask in masks if mask.any()]
        areas = torch.tensor([height * width / 64**2 for height, width in sizes])
        ratios = torch.tensor([height / width for height, width in sizes]).log()
        of_shapes = (areas.mean(), areas.std(), ratios.mean(), ratios.std())
        statistics.append([len(sizes) / number, *map(float, of_shapes)])
    assert statistics[0] == pytest.approx(statistics[1], abs=0.05)
    assert statistics[0][0] == pytest.approx(0.4, abs=0.03)
