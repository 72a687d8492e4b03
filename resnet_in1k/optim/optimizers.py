"""Optimizers: torch's if it has them, else timm's, which is imported only when needed.

The learning rate is set at each step, and gradients are clipped before it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from resnet_in1k.recipes.recipe import Recipe

NORMS = (_NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm)


def parameter_groups(model: torch.nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Divide the parameters into groups with and without weight decay, and the last layer if it needs its own.

    Norms are detected by module type, and the biases of other modules by name. The last layer has its own group if its
    learning rate differs, or if it is trained alone at first: fused SGD fails on a group in which only some parameters
    have momentum. All groups keep the order of the model.
    """
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


def _momentum(recipe: Recipe) -> dict[str, Any]:
    return {
        "lr": recipe.lr,
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
        "weight_decay": recipe.weight_decay,
    }


def sgd(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """SGD with momentum; weight decay is added to the gradient."""
    # None lets torch choose the fastest other implementation; False would be the slow loop over tensors.
    return torch.optim.SGD(parameter_groups(model, recipe), **_momentum(recipe), fused=True if fused else None)


def sgdw(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """SGD with momentum; the weights shrink by lr × weight_decay (https://arxiv.org/abs/1711.05101)."""
    from timm.optim import SGDW

    return SGDW(parameter_groups(model, recipe), **_momentum(recipe))


def adamw(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """https://arxiv.org/abs/1711.05101."""
    groups = parameter_groups(model, recipe)
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True if fused else None)


def lamb(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """https://arxiv.org/abs/1904.00962. The trust ratio does not scale parameters without weight decay."""
    from timm.optim import Lamb

    # timm's default of max_grad_norm, 1, would clip a second time.
    groups = parameter_groups(model, recipe)
    return Lamb(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, max_grad_norm=None)


def lars(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """https://arxiv.org/abs/1708.03888, coefficient 0.001. Parameters without weight decay are not scaled."""
    from timm.optim import Lars

    return Lars(parameter_groups(model, recipe), **_momentum(recipe))


def muon(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """Muon (https://kellerjordan.github.io/posts/muon/): SGD's momentum of a convolution, made orthogonal as a matrix
    of (output channels, all else). Other parameters get AdamW, or NAdamW with Nesterov's momentum.

    Updates have the size of AdamW's, so lr and weight_decay have its order (https://arxiv.org/abs/2502.16982).
    """
    from timm.optim import Muon

    groups = []
    for group in parameter_groups(model, recipe):
        for is_convolution in (True, False):
            parameters = [parameter for parameter in group["params"] if (parameter.ndim == 4) == is_convolution]
            if parameters:
                groups.append({**group, "params": parameters, "use_fallback": not is_convolution})
    return Muon(groups, **_momentum(recipe))


OPTIMIZERS: dict[str, Callable[[torch.nn.Module, Recipe, bool], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "sgdw": sgdw,
    "adamw": adamw,
    "lamb": lamb,
    "lars": lars,
    "muon": muon,
}
"""Constructors from (model, recipe, whether to use fused kernels)."""


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
