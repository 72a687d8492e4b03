"""Optimizers: torch's if it has them, else timm's, which is imported only when needed; and Muon.

The learning rate is set at each step, and gradients are clipped before it.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from resnet_in1k.optim.muon import Muon
from resnet_in1k.recipes.recipe import Recipe

Groups = list[dict[str, Any]]

NORMS = (_NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm)


def parameter_groups(model: torch.nn.Module, recipe: Recipe) -> Groups:
    """Divide the parameters into groups with and without weight decay, and by learning rate.

    Norms are detected by module type, and the biases of other modules by name. The last layer has its own group if its
    learning rate differs, or if it is trained alone at first: fused SGD fails on a group in which only some parameters
    have momentum. All groups keep the order of the model.
    """
    groups: dict[tuple[float, bool, bool], list[torch.nn.Parameter]] = {}
    head = getattr(model, "fc", None) if recipe.head_lr_factor != 1 or recipe.freeze_epochs else None
    layers = list(dict.fromkeys(_layer(name) for name, _ in model.named_parameters()))
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = isinstance(module, NORMS)
            decays = recipe.decay_norms if is_norm else recipe.decay_biases or name != "bias"
            lr_factor = recipe.layer_lr_decay ** (len(layers) - 1 - layers.index(_layer(module_name)))
            lr_factor *= recipe.head_lr_factor if module is head else 1.0
            groups.setdefault((lr_factor, module is head, not decays), []).append(parameter)
    return [
        {
            "params": parameters,
            **({"weight_decay": 0.0} if is_undecayed else {}),
            **({"lr_factor": lr_factor} if lr_factor != 1 else {}),
        }
        for (lr_factor, _, is_undecayed), parameters in groups.items()
    ]


def _layer(name: str) -> str:
    """Return the residual block of a parameter or module, such as `layer1.0`, `fc` for the last layer, else ""."""
    return ".".join(name.split(".")[:2]) if name.startswith("layer") else "fc" * name.startswith("fc")


def _momentum(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in ("lr", "momentum", "nesterov", "weight_decay")}


def _timm() -> ModuleType:
    import timm.optim

    return timm.optim


def muon(groups: Groups, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """Muon for convolutions, AdamW or NAdamW for other parameters."""
    divided = []
    for group in groups:
        for is_matrix in (True, False):
            parameters = [parameter for parameter in group["params"] if (parameter.ndim == 4) == is_matrix]
            if parameters:
                divided.append({**group, "params": parameters, "is_matrix": is_matrix})
    return Muon(divided, **_momentum(recipe), fallback_lr_factor=recipe.fallback_lr_factor)


# `fused or None`: None lets torch choose the fastest other implementation; False would be the slow loop over tensors.
OPTIMIZERS: dict[str, Callable[[Groups, Recipe, bool], torch.optim.Optimizer]] = {
    # SGD with momentum; weight decay is added to the gradient.
    "sgd": lambda groups, recipe, fused: torch.optim.SGD(groups, **_momentum(recipe), fused=fused or None),
    # SGD with momentum; the weights shrink by lr × weight_decay (https://arxiv.org/abs/1711.05101), as by AdamW.
    "sgdw": lambda groups, recipe, fused: _timm().SGDW(groups, **_momentum(recipe)),
    "adamw": lambda groups, recipe, fused: torch.optim.AdamW(
        groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused or None
    ),
    # https://arxiv.org/abs/1904.00962. The trust ratio does not scale parameters without weight decay, as LARS's does
    # not. timm's default of max_grad_norm, 1, would clip a second time.
    "lamb": lambda groups, recipe, fused: _timm().Lamb(
        groups, lr=recipe.lr, weight_decay=recipe.weight_decay, max_grad_norm=None
    ),
    # https://arxiv.org/abs/1708.03888, coefficient 0.001.
    "lars": lambda groups, recipe, fused: _timm().Lars(groups, **_momentum(recipe)),
    "muon": muon,
}
"""Constructors from (parameter groups, recipe, whether to use fused kernels)."""
