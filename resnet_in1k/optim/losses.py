"""Training losses. Each takes float32 logits (B, C) and targets, (B,) int64 class indices or (B, C) probabilities."""

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_in1k.optim.tables import choose
from resnet_in1k.recipes.recipe import Recipe

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) to the mean loss over the batch, ()."""


def cross_entropy(recipe: Recipe) -> Loss:
    return torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)


LOSSES: dict[str, Callable[[Recipe], Loss]] = {"cross_entropy": cross_entropy}


def build_loss(recipe: Recipe) -> Loss:
    """Raises UserError if the recipe's loss is not in LOSSES."""
    return choose(LOSSES, recipe.loss, "loss")(recipe)
