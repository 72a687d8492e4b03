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
    draws = JITTER.draw(torch.Generator().manual_seed(0), 20_000)
    ranges = {"brightness": (0.8, 1.2), "contrast": (0.7, 1.3), "saturation": (0.6, 1.4), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        assert low <= draws[name].min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < draws[name].max() <= high
        assert abs(draws[name].mean() - (low + high) / 2) < 0.02 * (high - low)


def test_every_order_is_equally_likely():
    order = JITTER.draw(torch.Generator().manual_seed(0), 20_000)["order"]
    orders, counts = order.unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 20_000 / 24 * 0.8


@pytest.mark.parametrize("on", ADJUSTMENTS)
def test_adjustment_that_is_off_is_left_out(images: torch.Tensor, on: str):
    """Even though factors are drawn for all four."""
    draws = JITTER.draw(torch.Generator().manual_seed(0), len(images))
    widths = {name: getattr(JITTER, name) if name == on else 0.0 for name in ADJUSTMENTS}
    adjusted, targets = ColorJitter(**widths).apply(images.float(), torch.arange(96), draws)
    assert torch.equal(adjusted, ADJUSTMENTS[on](images.float(), draws[on]))
    assert torch.equal(targets, torch.arange(96))


@pytest.mark.parametrize("num_images", [96, 5, 1])
def test_in_groups_each_image_gets_the_adjustments_that_it_gets_alone(images: torch.Tensor, num_images: int):
    """One image alone, by the table, in its order; and all at once with shapes that do not depend on the draws."""
    draws = {name: drawn[:num_images] for name, drawn in JITTER.draw(torch.Generator().manual_seed(2), 96).items()}
    before = images[:num_images].float()
    grouped, _ = JITTER.apply(before.clone(), torch.arange(num_images), JITTER.arrange(draws))
    chosen, _ = JITTER.apply(before.clone(), torch.arange(num_images), draws)
    for row, adjusted in enumerate(before.split(1)):
        for number in draws["order"][row].tolist():
            name = list(ADJUSTMENTS)[number]
            adjusted = ADJUSTMENTS[name](adjusted, draws[name][row : row + 1])
        torch.testing.assert_close(grouped[row], adjusted[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(chosen[row], adjusted[0], atol=1e-3, rtol=0)


def test_switching_one_adjustment_off_leaves_the_draws_of_the_others():
    draws = JITTER.draw(torch.Generator().manual_seed(0), 100)
    without_hue = ColorJitter(0.2, 0.3, 0.4, 0.0).draw(torch.Generator().manual_seed(0), 100)
    assert without_hue.keys() == draws.keys()
    assert all(torch.equal(without_hue[name], draws[name]) for name in draws if name != "hue")
    assert without_hue["hue"].abs().max() == 0
