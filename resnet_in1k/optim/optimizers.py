"""Optimizers. The learning rate is set anew at each step."""

from collections.abc import Callable

import torch

from resnet_in1k.optim.tables import choose
from resnet_in1k.recipes.recipe import Recipe


def sgd(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """SGD with momentum, weight decay on all parameters."""
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        # None lets torch choose the fastest other implementation; False would be the slow loop over tensors.
        fused=True if fused else None,
    )


OPTIMIZERS: dict[str, Callable[[torch.nn.Module, Recipe, bool], torch.optim.Optimizer]] = {"sgd": sgd}
"""Each makes an optimizer from (model, recipe, whether to use fused kernels)."""


def build_optimizer(model: torch.nn.Module, recipe: Recipe, *, fused: bool = True) -> torch.optim.Optimizer:
    """The recipe's optimizer, in fused kernels where it has them.

    Not `fused` under a gradient scaler: where that skips the first step, a fused SGD uses momentum that was never
    written.

    Raises:
        UserError: if the recipe's optimizer is not in OPTIMIZERS.
    """
    return choose(OPTIMIZERS, recipe.optimizer, "optimizer")(model, recipe, fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
