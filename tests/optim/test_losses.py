from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from resnet_in1k.optim.losses import LOSSES, balanced_weights
from resnet_in1k.recipes.recipe import Recipe

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_by_hand(tiny: Recipe, smoothing: float):
    """A share of each target spread evenly over all classes; index targets and probabilities alike."""
    loss = LOSSES[tiny.loss](replace(tiny, label_smoothing=smoothing), None)
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
    loss, theirs = LOSSES[recipe.loss](recipe, None), BinaryCrossEntropy(smoothing, threshold or None)
    assert loss(LOGITS, LABELS).item() == pytest.approx(theirs(LOGITS, LABELS).item())
    hard = torch.nn.functional.one_hot(LABELS, 3)
    smoothed = mixup_target(LABELS, 3, lam=0.7, smoothing=smoothing)  # it mixes with the batch in reverse order
    mixed = 0.7 * hard + 0.3 * hard.flip(0)
    assert loss(LOGITS, mixed).item() == pytest.approx(theirs(LOGITS, smoothed).item())


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_balanced_class_weights(tiny: Recipe, loss: str):
    """scikit-learn's balanced weights times each image's own loss; the parts of a batch add up."""
    labels = np.array([0, 1, 1, 1, 2, 2])
    weights = balanced_weights(labels, 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    torch.testing.assert_close(weights, torch.from_numpy(expected).float())
    assert balanced_weights(labels, 4)[3] == 0
    recipe = replace(tiny, loss=loss, label_smoothing=0.0)
    plain, weighted = LOSSES[loss](recipe, None), LOSSES[loss](recipe, weights)
    own = [plain(LOGITS[i : i + 1], LABELS[i : i + 1]) * weights[label] for i, label in enumerate(LABELS.tolist())]
    hard = torch.nn.functional.one_hot(LABELS, 3).float()
    for targets in (LABELS, hard):
        torch.testing.assert_close(weighted(LOGITS, targets), torch.stack(own).mean())
