"""Optimizers. The learning rate is set anew at each step, and gradients are clipped before it.

torch's where it has them, else timm's, which is imported only then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.validation import lookup

NORMS = (_NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm)


def parameter_groups(model: torch.nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters with weight decay and, if the recipe has such, those without: of norms by their modules' type, and
    other modules' biases. The last layer's apart, if it has a learning rate of its own or is trained alone at first:
    fused SGD takes no group of which only some have momentum yet. All in the order of the model."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    head = getattr(model, "fc", None) if recipe.head_lr_factor != 1 or recipe.freeze_epochs else None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = isinstance(module, NORMS)
            decays = recipe.decay_norms if is_norm else recipe.decay_biases or name != "bias"
            groups.setdefault((module is head, not decays), []).append(parameter)
    return [
        {
            "params": groups[is_head, is_undecayed],
            **({"weight_decay": 0.0} if is_undecayed else {}),
            **({"lr_factor": recipe.head_lr_factor} if is_head else {}),
        }
        for is_head, is_undecayed in sorted(groups)
    ]


def sgd(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """SGD with momentum; weight decay is added to the gradient."""
    return torch.optim.SGD(
        parameter_groups(model, recipe),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        # None lets torch choose the fastest other implementation; False would be the slow loop over tensors.
        fused=True if fused else None,
    )


def sgdw(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """SGD with momentum; the weights shrink by lr × weight_decay (https://arxiv.org/abs/1711.05101)."""
    from timm.optim import SGDW

    return SGDW(
        parameter_groups(model, recipe),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def adamw(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """https://arxiv.org/abs/1711.05101."""
    groups = parameter_groups(model, recipe)
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True if fused else None)


def lamb(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """https://arxiv.org/abs/1904.00962. Parameters without weight decay are not scaled by the trust ratio."""
    from timm.optim import Lamb

    # timm's default of max_grad_norm, 1, would clip unasked, and once more.
    groups = parameter_groups(model, recipe)
    return Lamb(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, max_grad_norm=None)


def lars(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """https://arxiv.org/abs/1708.03888, with the coefficient 0.001. Parameters without weight decay are not scaled."""
    from timm.optim import Lars

    return Lars(
        parameter_groups(model, recipe),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def muon(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """For convolutions SGD's momentum, made orthogonal as a matrix of (output channels, all else)
    (https://kellerjordan.github.io/posts/muon/); for everything else AdamW, or NAdamW with Nesterov's momentum. Updates
    have the size of AdamW's, so lr and weight_decay are of its order (https://arxiv.org/abs/2502.16982)."""
    from timm.optim import Muon

    groups = []
    for group in parameter_groups(model, recipe):
        for is_convolution in (True, False):
            parameters = [parameter for parameter in group["params"] if (parameter.ndim == 4) == is_convolution]
            if parameters:
                groups.append({**group, "params": parameters, "use_fallback": not is_convolution})
    return Muon(
        groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay
    )


OPTIMIZERS: dict[str, Callable[[torch.nn.Module, Recipe, bool], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "sgdw": sgdw,
    "adamw": adamw,
    "lamb": lamb,
    "lars": lars,
    "muon": muon,
}
"""Each makes an optimizer from (model, recipe, whether to use fused kernels)."""


def build_optimizer(model: torch.nn.Module, recipe: Recipe, *, fused: bool = True) -> torch.optim.Optimizer:
    """The recipe's optimizer, in fused kernels where it has them.

    Not `fused` under a gradient scaler: where that skips the first step, a fused SGD uses momentum that was never
    written.

    Raises:
        UserError: if the recipe's optimizer is not in OPTIMIZERS.
    """
    return lookup(OPTIMIZERS, recipe.optimizer, "optimizer")(model, recipe, fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
