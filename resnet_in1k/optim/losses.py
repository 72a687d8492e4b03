"""Training losses. Each takes float32 logits (B, C) and targets, (B,) int64 class indices or (B, C) probabilities."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, one_hot

from resnet_in1k.recipes.recipe import Recipe

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function from (logits, targets) to the mean loss over the batch, ()."""


def balanced_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Return all images / (classes × images of the class), (C,) float32; 0 for a class without images."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy(len(labels) / (num_classes * np.maximum(counts, 1)) * (counts > 0)).float()


def cross_entropy(recipe: Recipe, class_weights: Tensor | None) -> Loss:
    if class_weights is None:
        return torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    per_image = torch.nn.CrossEntropyLoss(class_weights, label_smoothing=recipe.label_smoothing, reduction="none")
    # Not torch's own mean, which divides by the weights in the batch: parts of a batch would not add up.
    return lambda logits, targets: per_image(logits, targets).mean()


def binary_cross_entropy(recipe: Recipe, class_weights: Tensor | None) -> Loss:
    """Make a loss of each class against all others, the mean over images and classes, as in timm's recipes.

    With a threshold both classes of mixed images are present (https://arxiv.org/abs/2110.00476, section 2.2).
    """

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        num_classes = logits.shape[1]
        dense = targets if targets.ndim == 2 else one_hot(targets, num_classes).to(logits.dtype)
        weights = None if class_weights is None else (dense @ class_weights)[:, None]
        dense = dense * (1 - recipe.label_smoothing) + recipe.label_smoothing / num_classes
        if recipe.bce_target_threshold:
            dense = (dense > recipe.bce_target_threshold).to(logits.dtype)
        return binary_cross_entropy_with_logits(logits, dense, weights)

    return loss


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(teacher ‖ model) of the predictions at temperature T, the mean over the batch, ().

    The square keeps the size of the gradients (https://arxiv.org/abs/1503.02531, section 2).
    """
    own, taught = ((each / temperature).log_softmax(dim=1) for each in (logits, teacher_logits))
    return temperature**2 * kl_div(own, taught, reduction="batchmean", log_target=True)


LOSSES: dict[str, Callable[[Recipe, Tensor | None], Loss]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
}
"""Constructors from (recipe, weights of the classes, (C,), or None)."""
