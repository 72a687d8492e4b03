"""A named recipe for another batch size, number of epochs or image size."""

import math
from typing import Any

from resnet_in1k.recipes.recipe import Recipe

RULES = {"none": lambda ratio: 1.0, "linear": lambda ratio: ratio, "sqrt": math.sqrt}
"""Factor on the learning rate for a batch that is `ratio` times larger. Linear keeps the expected sum of an epoch's
updates (https://arxiv.org/abs/1706.02677), the square root keeps its variance (https://arxiv.org/abs/1404.5997)."""


def scaled_fields(recipe: Recipe, epochs: int = 0, global_batch_size: int = 0, image_size: int = 0) -> dict[str, Any]:
    """Return the fields that change with these sizes, the sizes included; 0 leaves a size unchanged.

    The recipe's rule changes `lr` and `lr_floor`. Warm-up, milestones and the epochs in which images grow keep their
    share of the run. Other image sizes keep their ratio to image_size. The period of the schedule `step` stays, so that
    such a run may be resumed with more epochs.
    """
    changes: dict[str, Any] = {}
    if global_batch_size:
        factor = RULES[recipe.lr_batch_rule](global_batch_size / recipe.global_batch_size)
        changes["global_batch_size"] = global_batch_size
        changes["lr"], changes["lr_floor"] = recipe.lr * factor, recipe.lr_floor * factor
    if epochs:
        share = epochs / recipe.epochs
        changes["epochs"] = epochs
        changes["warmup_epochs"] = recipe.warmup_epochs * share
        changes["lr_milestones"] = tuple(epoch * share for epoch in recipe.lr_milestones)
        changes["freeze_epochs"] = round(recipe.freeze_epochs * share)
        if recipe.initial_image_size:
            start = max(1, round(recipe.image_size_ramp_start * share))
            changes["image_size_ramp_start"] = start
            changes["image_size_ramp_end"] = max(start + 1, round(recipe.image_size_ramp_end * share))
    if image_size and image_size != recipe.image_size:
        share = image_size / recipe.image_size
        changes["image_size"] = image_size
        if recipe.initial_image_size:  # a multiple of 32 px, like the other sizes of a ramp
            changes["initial_image_size"] = min(image_size, max(32, round(recipe.initial_image_size * share / 32) * 32))
        if recipe.eval_image_size:
            changes["eval_image_size"] = max(16, round(recipe.eval_image_size * share / 16) * 16)
    return changes
