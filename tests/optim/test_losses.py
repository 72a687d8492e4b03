from dataclasses import replace

import pytest
import torch

from resnet_in1k.optim.losses import LOSSES
from resnet_in1k.recipes.recipe import Recipe

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_by_hand(tiny: Recipe, smoothing: float):
    """A share of each target spread evenly over all classes; index targets and probabilities alike."""
    loss = LOSSES[tiny.loss](replace(tiny, label_smoothing=smoothing))
    target = torch.nn.functional.one_hot(LABELS, 3) * (1 - smoothing) + smoothing / 3
    log_probabilities = LOGITS - LOGITS.exp().sum(dim=1, keepdim=True).log()
    expected = -(target * log_probabilities).sum(dim=1).mean()
    assert loss(LOGITS, LABELS).item() == pytest.approx(expected.item())
    hard = torch.nn.functional.one_hot(LABELS, 3).float()
    assert loss(LOGITS, hard).item() == pytest.approx(expected.item())
    mixed = 0.7 * expected + 0.3 * loss(LOGITS, LABELS.flip(0))
    assert loss(LOGITS, 0.7 * hard + 0.3 * hard.flip(0)).item() == pytest.approx(mixed.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_binary_cross_entropy_is_timms(tiny: Recipe, smoothing: float, threshold: float):
    """Of labels, and of mixed targets, which timm smooths when it mixes them."""
    from timm.data.mixup import mixup_target
    from timm.loss import BinaryCrossEntropy

    recipe = replace(tiny, loss="binary_cross_entropy", label_smoothing=smoothing, bce_target_threshold=threshold)
    loss, theirs = LOSSES[recipe.loss](recipe), BinaryCrossEntropy(smoothing, threshold or None)
    assert loss(LOGITS, LABELS).item() == pytest.approx(theirs(LOGITS, LABELS).item())
    hard = torch.nn.functional.one_hot(LABELS, 3)
    smoothed = mixup_target(LABELS, 3, lam=0.7, smoothing=smoothing)  # it mixes with the batch in reverse order
    mixed = 0.7 * hard + 0.3 * hard.flip(0)
    assert loss(LOGITS, mixed).item() == pytest.approx(theirs(LOGITS, smoothed).item())
