"""The optimizer, and the learning rate as a pure function of the step."""

import math

import torch

from resnet_in1k.recipes import Recipe


def lr_at(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Warm-up rises linearly, per step, and reaches the peak at its last step. After it `step` drops between epochs, and
    `cosine` falls per step to zero just after the last one.
    """
    warmup_steps = round(recipe.warmup_epochs * steps_per_epoch)
    if step <= warmup_steps:
        return recipe.lr * step / warmup_steps
    if recipe.lr_schedule == "step":
        epochs_done = (step - 1) // steps_per_epoch
        return recipe.lr * recipe.lr_step_factor ** (epochs_done // recipe.lr_step_epochs)
    progress = (step - 1 - warmup_steps) / (recipe.epochs * steps_per_epoch - warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: torch.nn.Module, recipe: Recipe, fused: bool = True) -> torch.optim.Optimizer:
    """SGD with momentum, by default in one fused kernel. The learning rate is set anew at each step.

    Not to be fused under a gradient scaler: where that skips the first step, momentum is left uninitialised.
    """
    return torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=fused
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
