"""A named recipe for another batch, number of epochs or image size: what changes with it, unless that is given too."""

import math
from dataclasses import replace
from typing import Any

from resnet_in1k.recipes.recipe import Recipe

RULES = {"linear": lambda ratio: ratio, "sqrt": math.sqrt}
"""The factor on the learning rate for a batch that is larger by a factor: in proportion, which keeps the expected sum
of an epoch's updates (https://arxiv.org/abs/1706.02677), or to the root of it, which keeps that sum's variance
(https://arxiv.org/abs/1404.5997)."""
FOLLOW_EPOCHS = ("warmup_epochs", "lr_milestones", "freeze_epochs", "image_size_ramp_start", "image_size_ramp_end")
FOLLOW_IMAGE_SIZE = ("initial_image_size", "eval_image_size")


def scaled(recipe: Recipe, *, epochs: int = 0, global_batch_size: int = 0, image_size: int = 0) -> Recipe:
    """The recipe with so many epochs, so large a batch and training images; 0: as it is.

    Raises:
        UserError: for a number that a recipe cannot have.
    """
    fields = scaled_fields(recipe, epochs=epochs, global_batch_size=global_batch_size, image_size=image_size)
    return replace(recipe, **fields)


def scaled_fields(
    recipe: Recipe, *, epochs: int = 0, global_batch_size: int = 0, image_size: int = 0
) -> dict[str, Any]:
    """The fields that differ then, these three among them.

    The recipe's rule changes `lr` and `lr_floor`; warm-up, milestones and the epochs in which images grow keep their
    share of the run, other image sizes their ratio to the final one of training. The period of the schedule `step`
    stays: such a run may be resumed with more epochs.
    """
    changes: dict[str, Any] = {}
    if global_batch_size:
        rule = RULES.get(recipe.lr_batch_rule, lambda ratio: 1.0)
        factor = rule(global_batch_size / recipe.global_batch_size)
        changes |= {"global_batch_size": global_batch_size, "lr": recipe.lr * factor}
        changes["lr_floor"] = recipe.lr_floor * factor
    if epochs:
        share = epochs / recipe.epochs
        changes |= {
            "epochs": epochs,
            "warmup_epochs": recipe.warmup_epochs * share,
            "lr_milestones": tuple(epoch * share for epoch in recipe.lr_milestones),
            "freeze_epochs": round(recipe.freeze_epochs * share),
        }
    if epochs and recipe.initial_image_size:
        start = max(1, round(recipe.image_size_ramp_start * share))
        changes["image_size_ramp_start"] = start
        changes["image_size_ramp_end"] = max(start + 1, round(recipe.image_size_ramp_end * share))
    if image_size and image_size != recipe.image_size:
        share = image_size / recipe.image_size
        changes["image_size"] = image_size
        if recipe.initial_image_size:  # that of a ramp is a multiple of 32, as its other sizes
            changes["initial_image_size"] = min(image_size, max(32, round(recipe.initial_image_size * share / 32) * 32))
        if recipe.eval_image_size:
            changes["eval_image_size"] = max(16, round(recipe.eval_image_size * share / 16) * 16)
    return changes


def describe_scaling(named: Recipe, recipe: Recipe) -> list[str]:
    """What follows from another batch, number of epochs or image size than the named recipe's, in words; nothing if
    they are the same. A learning rate that does not follow the rule is said to be given."""
    lines = []
    if recipe.global_batch_size != named.global_batch_size:
        sizes = f"batch {named.global_batch_size} → {recipe.global_batch_size}"
        rule = recipe.lr_batch_rule
        by_rule = scaled_fields(replace(named, lr_batch_rule=rule), global_batch_size=recipe.global_batch_size)["lr"]
        if recipe.lr != by_rule:
            lines.append(f"{sizes}: lr {recipe.lr:g} as given; by the recipe's rule it would be {by_rule:g}")
        elif rule == "none":
            lines.append(f"{sizes}: lr stays {recipe.lr:g}, the recipe has no rule for it")
        else:
            lines.append(f"{sizes}: lr {named.lr:g} → {recipe.lr:g} by the recipe's rule, {rule}")
    for name, followers in (("epochs", FOLLOW_EPOCHS), ("image_size", FOLLOW_IMAGE_SIZE)):
        value = getattr(recipe, name)
        in_proportion = {name: getattr(named, name) for name in followers} | scaled_fields(named, **{name: value})
        changed = [
            f"{follower} {_words(getattr(named, follower))} → {_words(getattr(recipe, follower))}"
            for follower in followers
            if getattr(named, follower) != in_proportion[follower] == getattr(recipe, follower)
        ]
        if changed:
            lines.append(f"{name} {getattr(named, name)} → {value}, in proportion: {'; '.join(changed)}")
    return lines


def _words(value: float | tuple[float, ...]) -> str:
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else f"{value:g}"
