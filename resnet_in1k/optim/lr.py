"""The learning rate, a pure function of the optimizer step."""

import math
from collections.abc import Callable

from resnet_in1k.optim.tables import choose
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.schedule import Schedule

LRSchedule = Callable[[Recipe, float, float], float]
"""The factor on the recipe's lr after warm-up, from (recipe, epochs done as a fraction, share from 0 to 1 of the steps
after warm-up that are done). Before the first step both are 0."""


def step(recipe: Recipe, epochs_done: float, progress: float) -> float:
    """Drops between epochs."""
    return recipe.lr_step_factor ** (math.floor(epochs_done) // recipe.lr_step_epochs)


def cosine(recipe: Recipe, epochs_done: float, progress: float) -> float:
    """To zero just after the last step (https://arxiv.org/abs/1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


LR_SCHEDULES: dict[str, LRSchedule] = {"step": step, "cosine": cosine}


def lr_at(step: int, schedule: Schedule) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Warm-up rises linearly, per step, and reaches the peak at its last step.

    Raises:
        UserError: if the recipe's lr_schedule is not in LR_SCHEDULES.
    """
    recipe = schedule.recipe
    factor = choose(LR_SCHEDULES, recipe.lr_schedule, "lr_schedule")
    warmup_steps = round(recipe.warmup_epochs * schedule.steps_per_epoch)
    if step <= warmup_steps:
        return recipe.lr * step / warmup_steps
    progress = (step - 1 - warmup_steps) / (schedule.total_steps - warmup_steps)
    return recipe.lr * factor(recipe, (step - 1) / schedule.steps_per_epoch, progress)


def describe_lr(recipe: Recipe) -> str:
    """The schedule in words."""
    epochs = "epoch" if recipe.warmup_epochs == 1 else "epochs"
    warmup = f"{recipe.warmup_epochs:g} {epochs} of warm-up to " if recipe.warmup_epochs else ""
    every = "epoch" if recipe.lr_step_epochs == 1 else f"{recipe.lr_step_epochs} epochs"
    after = {"cosine": ", then cosine to 0", "step": f", × {recipe.lr_step_factor:g} every {every}"}
    return f"{warmup}{recipe.lr:g}" + after.get(recipe.lr_schedule, f", then {recipe.lr_schedule}")
