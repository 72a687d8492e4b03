"""The learning rate, a pure function of the optimizer step.

A new schedule is a function and a line in LR_SCHEDULES; its settings are fields of recipes/recipe.py.
"""

import math
from collections.abc import Callable

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.utils.validation import lookup

LRSchedule = Callable[[Recipe, float, float], float]
"""Function from (recipe, epochs done as a fraction, share from 0 to 1 of the steps after warm-up that are done) to the
factor on the recipe's lr. Before the first step both numbers are 0."""


def step_decay(recipe: Recipe, epochs_done: float, progress: float) -> float:
    """Drop between epochs."""
    return recipe.lr_step_factor ** (math.floor(epochs_done) // recipe.lr_step_epochs)


def multi_step(recipe: Recipe, epochs_done: float, progress: float) -> float:
    return recipe.lr_step_factor ** sum(epochs_done >= milestone for milestone in recipe.lr_milestones)


def cosine(recipe: Recipe, epochs_done: float, progress: float) -> float:
    """https://arxiv.org/abs/1608.03983, without restarts."""
    return _down_to_floor(recipe, 0.5 * (1 + math.cos(math.pi * progress)))


def linear(recipe: Recipe, epochs_done: float, progress: float) -> float:
    return _down_to_floor(recipe, 1 - progress)


def polynomial(recipe: Recipe, epochs_done: float, progress: float) -> float:
    """https://arxiv.org/abs/1708.03888, section 5, uses power 2."""
    return _down_to_floor(recipe, (1 - progress) ** recipe.lr_power)


def _down_to_floor(recipe: Recipe, height: float) -> float:
    """Scale `height`, which falls from 1 to 0 just after the last step, to end at lr_floor."""
    floor = recipe.lr_floor / recipe.lr
    return floor + (1 - floor) * height


LR_SCHEDULES: dict[str, LRSchedule] = {
    "step": step_decay,
    "multi_step": multi_step,
    "cosine": cosine,
    "linear": linear,
    "polynomial": polynomial,
}


def lr_at(step: int, counts: StepCounts) -> float:
    """Return the learning rate of optimizer step `step`, counted from 1.

    Warm-up rises linearly, per step, from warmup_start_factor of the peak before step 1 to the peak at its last step.

    Raises:
        UserError: if the recipe's lr_schedule is not in LR_SCHEDULES.
    """
    recipe = counts.recipe
    schedule = lookup(LR_SCHEDULES, recipe.lr_schedule, "lr_schedule")
    if step <= counts.warmup_steps:
        start = recipe.warmup_start_factor
        return recipe.lr * (start + (1 - start) * step / counts.warmup_steps)
    progress = (step - 1 - counts.warmup_steps) / (counts.total_steps - counts.warmup_steps)
    return recipe.lr * schedule(recipe, (step - 1) / counts.steps_per_epoch, progress)


def describe_lr(recipe: Recipe) -> str:
    """Return the schedule as text, such as "0.02 (warm-up until epoch 1), then cosine"."""
    warmup = f" (warm-up until epoch {recipe.warmup_epochs:g})" if recipe.warmup_epochs else ""
    drops = {"step": f"every {recipe.lr_step_epochs} epochs", "multi_step": f"after {recipe.lr_milestones} epochs"}
    drop = f" × {recipe.lr_step_factor:g} {drops[recipe.lr_schedule]}" if recipe.lr_schedule in drops else ""
    return f"{recipe.lr:g}{warmup}, then {recipe.lr_schedule}{drop}"
