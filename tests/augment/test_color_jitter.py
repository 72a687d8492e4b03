from collections import Counter

import pytest
import torch
import torchvision.transforms.v2.functional as F

from resnet_in1k.augment.color_jitter import ADJUSTMENTS, ColorJitter

JITTER = ColorJitter(brightness=0.2, contrast=0.3, saturation=0.4, hue=0.1)


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_each_adjustment_is_torchvisions_within_one_level(images: torch.Tensor, name: str):
    low, high = (-0.5, 0.5) if name == "hue" else (0.0, 2.0)
    factors = torch.empty(len(images)).uniform_(low, high, generator=torch.Generator().manual_seed(1))
    ours = ADJUSTMENTS[name](images.float(), factors)
    theirs = torch.stack([getattr(F, f"adjust_{name}")(i, float(f)) for i, f in zip(images, factors, strict=True)])
    assert (ours - theirs).abs().max() <= 1 + 1e-3


def test_factors_are_uniform_in_the_ranges_of_torchvision():
    draws, _ = JITTER.draw(torch.Generator().manual_seed(0), 20_000)
    ranges = {"brightness": (0.8, 1.2), "contrast": (0.7, 1.3), "saturation": (0.6, 1.4), "hue": (-0.1, 0.1)}
    for column, (low, high) in zip(draws.unbind(dim=1), ranges.values(), strict=True):
        assert low <= column.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < column.max() <= high
        assert abs(column.mean() - (low + high) / 2) < 0.02 * (high - low)


def test_every_order_is_equally_likely():
    generator = torch.Generator().manual_seed(0)
    orders = Counter(tuple(JITTER.draw(generator, 1)[1]) for _ in range(5_000))
    assert len(orders) == 24
    assert min(orders.values()) > 5_000 / 24 * 0.7


@pytest.mark.parametrize("on", ADJUSTMENTS)
def test_adjustment_that_is_off_is_left_out(images: torch.Tensor, on: str):
    """Factors are drawn for all four, so that switching one off leaves the draws of the others."""
    jitter = ColorJitter(**{**dict.fromkeys(ADJUSTMENTS, 0.0), on: getattr(JITTER, on)})
    column = list(ADJUSTMENTS).index(on)
    (draws, order), (of_all, _) = (each.draw(torch.Generator().manual_seed(0), 96) for each in (jitter, JITTER))
    assert torch.equal(draws[:, column], of_all[:, column])
    adjusted, _ = jitter.apply(images.float(), torch.arange(96), draws, order)
    assert torch.equal(adjusted, ADJUSTMENTS[on](images.float(), draws[:, column]))
