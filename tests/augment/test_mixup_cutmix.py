"""Against torchvision's v2.MixUp and v2.CutMix, pair by pair, with the draws given."""

import pytest
import torch
from torchvision.transforms import v2

from resnet_in1k.augment.mixup_cutmix import Mixing

NUM_CLASSES = 5
TARGETS = torch.arange(96) % NUM_CLASSES


def mixing(mixup_alpha: float = 0.2, cutmix_alpha: float = 1.0, by_pair: bool = True) -> Mixing:
    return Mixing(mixup_alpha, cutmix_alpha, by_pair, NUM_CLASSES)


IS_CUTMIX, WEIGHT, CENTER = 0, 1, slice(2, 4)
"""Columns of the draws."""


def draws_of(operation: Mixing, seed: int = 0, batch_size: int = 96) -> torch.Tensor:
    return operation.draw(torch.Generator().manual_seed(seed), batch_size)[0]


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
    operation = mixing(*alphas)
    draws = draws_of(operation)
    ours, targets = operation.apply(images.float(), TARGETS, draws, None)
    for first in range(0, 96, 2):
        pair = slice(first, first + 2)
        expected, expected_targets = torchvisions(
            transform(num_classes=NUM_CLASSES),
            images[pair].float(),
            TARGETS[pair],
            draws[first, WEIGHT].item(),
            draws[first, CENTER],
        )
        torch.testing.assert_close(ours[pair], expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(targets[pair], expected_targets, rtol=1e-5, atol=1e-6)
    assert (ours != images).any()


def test_a_batch_is_mixed_in_one_way_or_each_pair_in_its_own():
    kinds = []
    for seed in range(200):
        draws = draws_of(mixing(by_pair=False), seed, 8)
        assert (draws == draws[0]).all()
        kinds.append(draws[0, IS_CUTMIX].item())
    assert 70 < sum(kinds) < 130
    draws = draws_of(mixing(), 0, 2000)
    pairs = draws.view(1000, 2, -1)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert 0.44 < draws[:, IS_CUTMIX].mean() < 0.56
    assert draws[:, WEIGHT].unique().numel() > 990


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_weights_have_the_beta_distribution(alpha: float):
    weights = draws_of(mixing(mixup_alpha=alpha, cutmix_alpha=0.0), batch_size=40_000)[::2, WEIGHT]
    expected = torch.distributions.Beta(alpha, alpha)
    assert abs(weights.mean() - expected.mean) < 0.01
    assert abs(weights.var() - expected.variance) < 0.005
