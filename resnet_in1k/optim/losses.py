"""Training losses. Each takes float32 logits (B, C) and targets, (B,) int64 class indices or (B, C) probabilities."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from resnet_in1k.recipes.recipe import Recipe

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function from (logits, targets) to the mean loss over the batch, ()."""


def binary_cross_entropy(recipe: Recipe) -> Loss:
    """Make a loss of each class against all others, the mean over images and classes, as in timm's recipes.

    With a threshold both classes of mixed images are present (https://arxiv.org/abs/2110.00476, section 2.2).
    """

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        num_classes = logits.shape[1]
        dense = targets if targets.ndim == 2 else one_hot(targets, num_classes).to(logits.dtype)
        dense = dense * (1 - recipe.label_smoothing) + recipe.label_smoothing / num_classes
        if recipe.bce_target_threshold:
            dense = (dense > recipe.bce_target_threshold).to(logits.dtype)
        return binary_cross_entropy_with_logits(logits, dense)

    return loss


LOSSES: dict[str, Callable[[Recipe], Loss]] = {
    "cross_entropy": lambda recipe: torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
    "binary_cross_entropy": binary_cross_entropy,
}
