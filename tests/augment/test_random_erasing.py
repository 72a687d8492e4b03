"""Against torchvision's RandomErasing: the same rectangle for the same draw, and the same distribution."""

from dataclasses import replace

import pytest
import torch
from torchvision.transforms import v2

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.augment.random_erasing import RandomErasing
from resnet_in1k.recipes.published import RECIPES

TARGETS = torch.arange(96)


def test_rectangles_are_torchvisions_for_the_same_draw(images: torch.Tensor):
    """torchvision draws place and size in pixels, of which the shares follow."""
    torch.manual_seed(1)
    theirs = v2.RandomErasing(p=1.0)
    params = [theirs.make_params([image]) for image in images]
    assert all(each["v"] is not None for each in params)
    sides = torch.tensor([[each["h"], each["w"]] for each in params]) / 64
    places = torch.tensor([[each["i"], each["j"]] for each in params])
    corner = (places + 0.5) / (64 - sides * 64 + 1)
    ours, targets = RandomErasing(1.0).apply(images.float(), TARGETS, {"sides": sides, "corner": corner})
    expected = torch.stack(
        [theirs.transform(image, each) for image, each in zip(normalize(images), params, strict=True)]
    )
    torch.testing.assert_close(normalize(ours), expected, rtol=0, atol=1e-5)
    assert torch.equal(targets, TARGETS)


def rectangle_of(erased: torch.Tensor) -> tuple[int, int]:
    """Height and width of what is not zero in an image of ones."""
    return int(erased.any(dim=1).sum()), int(erased.any(dim=0).sum())


def test_rectangles_have_torchvisions_distribution():
    """Share of images erased, mean and spread of area and of the logarithm of the ratio, over 3,000 images of 64 px."""
    torch.manual_seed(0)
    number, blank = 3000, torch.full((1, 3, 64, 64), 255.0)
    theirs = [v2.RandomErasing(p=0.4)(torch.ones(1, 64, 64))[0] == 0 for _ in range(number)]
    operation = RandomErasing(0.4)
    drawn = operation.draw(torch.Generator().manual_seed(0), number)
    erased, _ = operation.apply(blank.expand(number, -1, -1, -1), torch.arange(number), drawn)
    ours = [image[0] != 255 for image in erased]
    statistics = []
    for masks in (ours, theirs):
        sizes = [rectangle_of(mask) for mask in masks if mask.any()]
        areas = torch.tensor([height * width / 64**2 for height, width in sizes])
        ratios = torch.tensor([height / width for height, width in sizes]).log()
        of_shapes = (areas.mean(), areas.std(), ratios.mean(), ratios.std())
        statistics.append([len(sizes) / number, *map(float, of_shapes)])
    assert statistics[0] == pytest.approx(statistics[1], abs=0.05)
    assert statistics[0][0] == pytest.approx(0.4, abs=0.03)


def test_what_is_erased_is_zero_for_the_network(images: torch.Tensor):
    recipe = replace(RECIPES["tutorial"].recipe, random_erasing_probability=1.0, global_batch_size=96)
    augmentation = Augmentation(recipe, 96)
    pixels, _ = augmentation.apply(images, TARGETS, augmentation.draw(step=1))
    erased = (pixels == 0).all(dim=1)
    assert (erased.flatten(1).float().mean(dim=1) > 0.015).float().mean() > 0.95
