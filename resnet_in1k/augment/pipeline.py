"""Augmentation of a batch on the device: the recipe's operations, in order.

Loader workers crop the images and apply the recipe's policy before: see data/crop.py.
"""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.operations import OPERATIONS, Draws
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import rng
from resnet_in1k.utils.device import copy_to_device
from resnet_in1k.utils.rng import Stream

CPU_CHUNK_IMAGES, CHUNK_IMAGES = 4, 256
"""Images augmented at a time. Four images stay in a CPU's cache from one operation to the next, which is twice as fast;
on other devices the limit is for the memory of intermediate results."""


class Augmentation:
    """The augmentation of one process's share of each global batch."""

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        rank: int = 0,
        num_processes: int = 1,
        draw_for_step: Callable[[int], Draws] = lambda step: {},
    ):
        """`draw_for_step`: draws for a global batch that the training step needs; they join the copy to the device."""
        self._recipe, self._num_classes, self._draw_for_step = recipe, num_classes, draw_for_step
        self._operations = [each for each in OPERATIONS if any(getattr(recipe, field) for field in each.fields)]
        share = recipe.global_batch_size // num_processes
        self._rows = slice(rank * share, (rank + 1) * share)

    def draw(self, step: int) -> Draws:
        """Draw for the global batch, and return this process's rows: a function of (seed, operation's name, step)."""
        draws: Draws = {}
        for operation in self._operations:
            generator = rng.generator(self._recipe.seed, Stream.AUGMENT, zlib.crc32(operation.name.encode()), step)
            draws |= operation.draw(self._recipe, generator)
        return {name: values[self._rows] for name, values in draws.items()}

    def apply_to(self, batch: Any) -> tuple[Tensor, ...]:
        """Augment a Batch of data/loader.py that is on the device; return the arguments of a training step."""
        return self(batch.images, batch.labels, batch.step)

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, ...]:
        """Augment and normalize the images of a step; the preflight has fewer images than a batch.

        Args:
            images: (B, 3, S, S) uint8, channels_last as from the loader.
            targets: (B,) int64 class indices.

        Returns:
            (B, 3, S, S) float32, channels_last; (B,) int64, or (B, C) float32 if the recipe mixes images; and what
            `draw_for_step` draws, each (B, k) float32.
        """
        for_step = {name: values[self._rows] for name, values in self._draw_for_step(step).items()}
        draws = _copy_together({**self.draw(step), **for_step}, images.device)
        if self._recipe.mixes:
            targets = one_hot(targets, self._num_classes).float()
        size = CPU_CHUNK_IMAGES if images.device.type == "cpu" else CHUNK_IMAGES
        augmented, all_labels = None, []
        if len(images) > size:  # in place of the chunks next to their concatenation: half the memory
            augmented = torch.empty_like(images, dtype=torch.float32, memory_format=torch.channels_last)
        for start in range(0, len(images), size):
            rows = slice(start, min(start + size, len(images)))
            part, labels, drawn = images[rows], targets[rows], {name: values[rows] for name, values in draws.items()}
            for operation in self._operations:
                part, labels = operation.apply(part, labels, drawn)
            normalized = normalize(part, out=None if augmented is None else augmented[rows])
            all_labels.append(labels)
        result = normalized if augmented is None else augmented
        return result, torch.cat(all_labels), *(draws[name][: len(images)] for name in for_step)


def _copy_together(draws: Draws, device: torch.device) -> Draws:
    """Copy all draws to the device in one copy."""
    if not draws:
        return {}
    widths = [values.shape[1] for values in draws.values()]
    together = copy_to_device(torch.cat(list(draws.values()), dim=1), device)
    return dict(zip(draws, together.split(widths, dim=1), strict=True))
