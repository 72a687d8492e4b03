"""The arithmetic of a run: epochs, steps, batches and image sizes; and a recipe scaled to other ones."""

import math
from dataclasses import replace
from typing import Any

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count

EVAL_BATCH_SIZE = 128
"""Images per process and forward pass of evaluation. Another batch size, number of processes or type of device changes
logits by float32 rounding, about 1e-6 relative, so counts change only for images with two classes that close."""

NETWORK_STRIDE = 32
"""Factor by which a ResNet reduces images: a size between two multiples costs as much as the larger one."""
LR_RULES = {"none": lambda ratio: 1.0, "linear": lambda ratio: ratio, "sqrt": math.sqrt}
"""Factor on the learning rate for a batch that is `ratio` times larger. Linear keeps the expected sum of an epoch's
updates (https://arxiv.org/abs/1706.02677), the square root keeps its variance (https://arxiv.org/abs/1404.5997)."""


class StepCounts:
    """Sizes that follow from the recipe, the number of processes and the number of images.

    Epochs and optimizer steps count from 1.

    Raises:
        UserError: if the global batch cannot be divided evenly, or is larger than the data.
    """

    def __init__(self, recipe: Recipe, num_processes: int, gradient_accumulation_steps: int, num_train_images: int):
        batch, unit = recipe.global_batch_size, num_processes * gradient_accumulation_steps
        if recipe.mixes:  # each process mixes pairs
            unit = math.lcm(unit, 2 * num_processes)
        if batch % unit:
            raise UserError(
                f"--global-batch-size {batch} cannot be divided evenly among {count(num_processes, 'process', 'es')} × "
                f"{count(gradient_accumulation_steps, 'accumulation step')}"
                f"{', in pairs for mixing' if recipe.mixes else ''}; use a multiple of {unit}"
            )
        if num_train_images < batch:
            raise UserError(
                f"{num_train_images} training images are fewer than --global-batch-size {batch}; use a smaller batch "
                "or more images"
            )
        self.recipe, self.num_processes = recipe, num_processes
        self.gradient_accumulation_steps, self.num_train_images = gradient_accumulation_steps, num_train_images
        self.per_process_batch_size = batch // num_processes  # images per optimizer step
        self.per_device_batch_size = self.per_process_batch_size // gradient_accumulation_steps  # per forward pass
        self.steps_per_epoch = num_train_images // batch  # complete global batches
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.warmup_steps = round(recipe.warmup_epochs * self.steps_per_epoch)
        # The first steps, which train only the last layer.
        self.frozen_steps = min(recipe.freeze_epochs, recipe.epochs) * self.steps_per_epoch
        # Steps between two updates of the moving average: at least one update an epoch.
        self.ema_every_steps = min(recipe.ema_every_steps, self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        return (step - 1) // self.steps_per_epoch + 1

    def is_last_in_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def steps_into_epoch(self, step: int) -> int:
        """Position of a step in its epoch, from 1 to steps_per_epoch."""
        return (step - 1) % self.steps_per_epoch + 1


def accumulation_steps(global_batch_size: int, num_processes: int, images_per_forward_pass: int) -> int:
    """Return the fewest accumulation steps with at most that many images in a process's forward pass; 1 if the batch
    cannot be divided so."""
    for steps in range(1, global_batch_size // num_processes + 1):
        images, rest = divmod(global_batch_size, num_processes * steps)
        if rest == 0 and images <= images_per_forward_pass:
            return steps
    return 1


def train_image_size(recipe: Recipe, epoch: int) -> int:
    """Return the side of the training square in an epoch, in pixels.

    It grows linearly from initial_image_size to image_size, to the nearest multiple of 32 px, as in FFCV's recipes
    (https://arxiv.org/abs/2306.12517).
    """
    first, last = recipe.image_size_ramp_start, recipe.image_size_ramp_end
    if not recipe.initial_image_size or epoch >= last:
        return recipe.image_size
    if epoch <= first:
        return recipe.initial_image_size
    grown = (recipe.image_size - recipe.initial_image_size) * (epoch - first) / (last - first)
    nearest = round((recipe.initial_image_size + grown) / NETWORK_STRIDE) * NETWORK_STRIDE
    return min(max(recipe.initial_image_size, nearest), recipe.image_size)


def scaled(recipe: Recipe, **fields: Any) -> Recipe:
    """Return the recipe with these fields; a changed size scales other fields that are not given.

    For another global_batch_size, the recipe's rule changes `lr` and `lr_floor`. For other epochs, warm-up, milestones
    and the epochs in which images grow keep their share of the run. For another image_size, the other sizes keep their
    ratio to it. The period of the schedule `step` stays, so that such a run may be resumed with more epochs.

    Raises:
        UserError: if the result is not a valid recipe.
    """
    # A size out of range scales nothing: the recipe refuses it.
    global_batch_size, epochs, image_size = (
        max(0, fields.get(name, 0)) for name in ("global_batch_size", "epochs", "image_size")
    )
    changes: dict[str, Any] = {}
    if global_batch_size:
        rule = LR_RULES.get(fields.get("lr_batch_rule", recipe.lr_batch_rule), LR_RULES["none"])
        factor = rule(global_batch_size / recipe.global_batch_size)
        changes["lr"], changes["lr_floor"] = recipe.lr * factor, recipe.lr_floor * factor
    if epochs:
        share = epochs / recipe.epochs
        changes["warmup_epochs"] = recipe.warmup_epochs * share
        changes["lr_milestones"] = tuple(epoch * share for epoch in recipe.lr_milestones)
        changes["freeze_epochs"] = round(recipe.freeze_epochs * share)
        if recipe.initial_image_size:
            start = max(1, round(recipe.image_size_ramp_start * share))
            changes["image_size_ramp_start"] = start
            changes["image_size_ramp_end"] = max(start + 1, round(recipe.image_size_ramp_end * share))
    if image_size and image_size != recipe.image_size:
        share = image_size / recipe.image_size
        if recipe.initial_image_size:  # a multiple of 32 px, like the other sizes of a ramp
            changes["initial_image_size"] = min(image_size, max(32, round(recipe.initial_image_size * share / 32) * 32))
        if recipe.eval_image_size:
            changes["eval_image_size"] = max(16, round(recipe.eval_image_size * share / 16) * 16)
    return replace(recipe, **{**changes, **fields})
