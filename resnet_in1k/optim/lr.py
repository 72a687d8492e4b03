"""The learning rate, a pure function of the optimizer step."""

import math
from collections.abc import Callable

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.utils.validation import lookup

LRSchedule = Callable[[Recipe, float, float], float]
"""The factor on the recipe's lr after warm-up, from (recipe, epochs done as a fraction, share from 0 to 1 of the steps
after warm-up that are done). Before the first step both are 0."""


def step(recipe: Recipe, epochs_done: float, progress: float) -> float:
    """Drops between epochs."""
    return recipe.lr_step_factor ** (math.floor(epochs_done) // recipe.lr_step_epochs)


def multi_step(recipe: Recipe, epochs_done: float, progress: float) -> float:
    return recipe.lr_step_factor ** sum(epochs_done >= milestone for milestone in recipe.lr_milestones)


def cosine(recipe: Recipe, epochs_done: float, progress: float) -> float:
    """https://arxiv.org/abs/1608.03983, without restarts."""
    return _down_to_floor(recipe, 0.5 * (1 + math.cos(math.pi * progress)))


def linear(recipe: Recipe, epochs_done: float, progress: float) -> float:
    return _down_to_floor(recipe, 1 - progress)


def polynomial(recipe: Recipe, epochs_done: float, progress: float) -> float:
    """https://arxiv.org/abs/1708.03888, section 5, has the power 2."""
    return _down_to_floor(recipe, (1 - progress) ** recipe.lr_power)


def _down_to_floor(recipe: Recipe, height: float) -> float:
    """`height` runs from 1 to 0 just after the last step."""
    floor = recipe.lr_floor / recipe.lr
    return floor + (1 - floor) * height


LR_SCHEDULES: dict[str, LRSchedule] = {
    "step": step,
    "multi_step": multi_step,
    "cosine": cosine,
    "linear": linear,
    "polynomial": polynomial,
}


def lr_at(step: int, schedule: StepCounts) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Warm-up rises linearly, per step, from warmup_start_factor of the peak before step 1 to the peak at its last step.

    Raises:
        UserError: if the recipe's lr_schedule is not in LR_SCHEDULES.
    """
    recipe = schedule.recipe
    factor = lookup(LR_SCHEDULES, recipe.lr_schedule, "lr_schedule")
    warmup_steps = schedule.warmup_steps
    if step <= warmup_steps:
        start = recipe.warmup_start_factor
        return recipe.lr * (start + (1 - start) * step / warmup_steps)
    progress = (step - 1 - warmup_steps) / (schedule.total_steps - warmup_steps)
    return recipe.lr * factor(recipe, (step - 1) / schedule.steps_per_epoch, progress)


def describe_lr(recipe: Recipe) -> str:
    """The schedule in words."""
    warmup = ""
    if recipe.warmup_epochs:
        start = f" from {recipe.warmup_start_factor * recipe.lr:g}" if recipe.warmup_start_factor else ""
        epochs = "epoch" if recipe.warmup_epochs == 1 else "epochs"
        warmup = f"{recipe.warmup_epochs:g} {epochs} of warm-up{start} to "
    every = "epoch" if recipe.lr_step_epochs == 1 else f"{recipe.lr_step_epochs} epochs"
    milestones = ", ".join(f"{epoch:g}" for epoch in recipe.lr_milestones)
    after = {
        "step": f", × {recipe.lr_step_factor:g} every {every}",
        "multi_step": f", × {recipe.lr_step_factor:g} after {milestones} epochs",
        "polynomial": f", then polynomial of power {recipe.lr_power:g} to {recipe.lr_floor:g}",
    }
    to_floor = f", then {recipe.lr_schedule}" + (
        f" to {recipe.lr_floor:g}" if recipe.lr_schedule in ("cosine", "linear") else ""
    )
    return f"{warmup}{recipe.lr:g}" + after.get(recipe.lr_schedule, to_floor)
