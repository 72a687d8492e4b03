"""Each operation against torchvision's of the same draws, and its draws against torchvision's distributions."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms import v2

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.operations import (
    ADJUSTMENTS,
    adjust_colors,
    draw_color_jitter,
    draw_erasing,
    draw_flip,
    draw_mixing,
    draw_rotation,
    erase,
    flip,
    mix,
    rotate,
)
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe

RECIPE = replace(RECIPES["tutorial"].recipe, brightness=0.2, contrast=0.3, saturation=0.4, hue=0.1)
NUM_CLASSES = 5
TARGETS = torch.arange(96) % NUM_CLASSES
PROBABILITIES = torch.nn.functional.one_hot(TARGETS, NUM_CLASSES).float()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recipe_of(number: int, **fields: object) -> Recipe:
    """A recipe whose operations draw that many numbers."""
    return replace(RECIPE, global_batch_size=number, **fields)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flip_is_torchvisions(images: torch.Tensor, dtype: torch.dtype):
    mirrored = torch.arange(len(images)) % 3 == 0
    expected = torch.stack([F.hflip(i) if m else i for i, m in zip(images, mirrored, strict=True)]).to(dtype)
    flipped, targets = flip(images.to(dtype), TARGETS, {"is_mirrored": mirrored.float().unsqueeze(1)})
    assert torch.equal(flipped, expected)
    assert torch.equal(targets, TARGETS)


def test_share_of_mirrored_images_is_the_probability():
    for probability in (0.1, 0.5, 1.0):
        draws = draw_flip(recipe_of(20_000, hflip_probability=probability), seeded())
        assert abs(draws["is_mirrored"].mean() - probability) < 0.02


def test_rotation_is_torchvisions_but_for_ties_between_two_pixels(images: torch.Tensor):
    degrees = torch.empty(len(images), 1).uniform_(-180, 180, generator=seeded(1))
    ours, targets = rotate(images, TARGETS, {"degrees": degrees})
    theirs = torch.stack([F.rotate(i, float(d)) for i, d in zip(images, degrees, strict=True)])
    assert (ours != theirs).any(dim=1).float().mean() < 1e-4  # where the nearest pixel is a matter of rounding
    assert torch.equal(targets, TARGETS)


def test_angles_are_uniform_to_either_side():
    degrees = draw_rotation(recipe_of(20_000, rotation_degrees=10), seeded())["degrees"]
    assert -10 <= degrees.min() < -9.9
    assert 9.9 < degrees.max() <= 10
    assert abs(degrees.mean()) < 0.2
    assert abs(degrees.std() - 20 / 12**0.5) < 0.1


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_each_adjustment_is_torchvisions_within_one_level(images: torch.Tensor, name: str):
    low, high = (-0.5, 0.5) if name == "hue" else (0.0, 2.0)
    factors = torch.empty(len(images), 1).uniform_(low, high, generator=seeded(1))
    ours, _ = adjust_colors(images, TARGETS, {name: factors})
    theirs = torch.stack([getattr(F, f"adjust_{name}")(i, float(f)) for i, f in zip(images, factors, strict=True)])
    assert (ours - theirs).abs().max() <= 1 + 1e-3


def test_factors_are_uniform_in_the_ranges_of_torchvision():
    draws = draw_color_jitter(recipe_of(20_000), seeded())
    ranges = {"brightness": (0.8, 1.2), "contrast": (0.7, 1.3), "saturation": (0.6, 1.4), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        assert low <= draws[name].min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < draws[name].max() <= high
        assert abs(draws[name].mean() - (low + high) / 2) < 0.02 * (high - low)


def test_every_order_is_equally_likely():
    generator = seeded()
    orders = Counter(tuple(draw_color_jitter(recipe_of(1), generator)) for _ in range(5_000))
    assert len(orders) == 24
    assert min(orders.values()) > 5_000 / 24 * 0.7


@pytest.mark.parametrize("on", ADJUSTMENTS)
def test_adjustment_that_is_off_is_left_out(on: str):
    """Factors are drawn for all four, so that switching one off leaves the draws of the others."""
    off = dict.fromkeys(ADJUSTMENTS.keys() - {on}, 0.0)
    alone, all_four = (draw_color_jitter(recipe_of(96, **fields), seeded()) for fields in (off, {}))
    assert list(alone) == [on]
    assert torch.equal(alone[on], all_four[on])


def test_rectangles_are_torchvisions_for_the_same_draw(images: torch.Tensor):
    """torchvision draws place and size in pixels, of which the shares follow."""
    torch.manual_seed(1)
    theirs = v2.RandomErasing(p=1.0)
    params = [theirs.make_params([image]) for image in images]
    assert all(each["v"] is not None for each in params)
    sides = torch.tensor([[each["h"], each["w"]] for each in params]) / 64
    places = torch.tensor([[each["i"], each["j"]] for each in params])
    corner = (places + 0.5) / (64 - sides * 64 + 1)
    ours, targets = erase(images, TARGETS, {"erased_sides": sides, "erased_corner": corner})
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
    draws = draw_erasing(recipe_of(number, random_erasing_probability=0.4), seeded())
    erased, _ = erase(blank.expand(number, -1, -1, -1), torch.arange(number), draws)
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


def mixing_draws(
    mixup_alpha: float = 0.2, cutmix_alpha: float = 1.0, by_pair: bool = True, seed: int = 0, number: int = 96
) -> dict[str, torch.Tensor]:
    fields = {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha, "mix_by_pair": by_pair}
    return draw_mixing(recipe_of(number, **fields), seeded(seed))


def torchvisions(
    transform: v2.MixUp | v2.CutMix, images: torch.Tensor, targets: torch.Tensor, weight: float, center: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair through torchvision's transform, which gets its draws from us: weight, and for cutmix the center."""
    # It draws x, of the second axis, first.
    numbers = iter((center.flip(0) * images.shape[-1]).long().split(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform._dist, "sample", lambda _: torch.tensor([weight]))
        patch.setattr(torch, "randint", lambda *_, **__: next(numbers))
        return transform(images, targets)


@pytest.mark.parametrize(("transform", "alphas"), [(v2.MixUp, (0.2, 0.0)), (v2.CutMix, (0.0, 1.0))])
def test_each_pair_is_mixed_as_torchvision_mixes_it(images: torch.Tensor, transform: type, alphas: tuple):
    draws = mixing_draws(*alphas)
    ours, targets = mix(images, PROBABILITIES, draws)
    for first in range(0, 96, 2):
        pair = slice(first, first + 2)
        expected, expected_targets = torchvisions(
            transform(num_classes=NUM_CLASSES),
            images[pair].float(),
            TARGETS[pair],
            draws["mixing_weight"][first].item(),
            draws["cutmix_center"][first],
        )
        torch.testing.assert_close(ours[pair], expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(targets[pair], expected_targets, rtol=1e-5, atol=1e-6)
    assert (ours != images).any()


def test_a_batch_is_mixed_in_one_way_or_each_pair_in_its_own():
    kinds = []
    for seed in range(200):
        draws = mixing_draws(by_pair=False, seed=seed, number=8)
        assert all((values == values[0]).all() for values in draws.values())
        kinds.append(draws["is_cutmix"][0].item())
    assert 70 < sum(kinds) < 130
    draws = mixing_draws(number=2000)
    assert all(torch.equal(values[::2], values[1::2]) for values in draws.values())
    assert 0.44 < draws["is_cutmix"].mean() < 0.56
    assert draws["mixing_weight"].unique().numel() > 990


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_weights_have_the_beta_distribution(alpha: float):
    weights = mixing_draws(mixup_alpha=alpha, cutmix_alpha=0.0, number=40_000)["mixing_weight"][::2]
    expected = torch.distributions.Beta(alpha, alpha)
    assert abs(weights.mean() - expected.mean) < 0.01
    assert abs(weights.var() - expected.variance) < 0.005
