"""Augmentation of a batch on the device: the recipe's operations, in order.

Loader workers crop the images and apply the recipe's policy before: see data/crop.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from resnet_in1k.augment.color_jitter import ColorJitter
from resnet_in1k.augment.geometry import HorizontalFlip, RandomErasing, Rotation
from resnet_in1k.augment.mixup_cutmix import Mixing
from resnet_in1k.augment.normalize import normalize
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import rng
from resnet_in1k.utils.device import copy_to_device
from resnet_in1k.utils.rng import Stream

CPU_CHUNK_IMAGES, CHUNK_IMAGES = 4, 256
"""Images augmented at a time. Four images stay in a CPU's cache from one operation to the next, which is twice as fast;
on other devices the limit is for the memory of intermediate results."""


class Operation(Protocol):
    """One augmentation for complete batches, each image with its own parameters.

    Mixing pairs the images 2k and 2k + 1. Each process has an even number of images, so no pair is split.
    """

    name: str
    """Key of the random stream: operations of different names draw independently."""
    works_on_uint8: bool
    """True if `apply` also takes uint8 images, which need a quarter of the memory traffic."""

    def draw(self, generator: torch.Generator, batch_size: int) -> tuple[Tensor, Any]:
        """Draw the parameters of a global batch on the CPU: (B, K) float32, one row per image, and one Python value for
        the batch, which the host can read without waiting for the device; None if it is not used."""

    def apply(self, images: Tensor, targets: Tensor, draws: Tensor, shared: Any) -> tuple[Tensor, Tensor]:
        """Augment B images, possibly in place.

        It must not read a tensor's values on the host (`.item()`, `.nonzero()`, `if tensor`).

        Args:
            images: (B, 3, S, S) float32 from 0 to 255, or uint8 if `works_on_uint8`.
            targets: (B,) int64 class indices.
            draws: (B, K) float32 on the same device.

        Returns:
            Images, and targets or (B, C) float32 probabilities.
        """


OPERATIONS: list[Callable[[Recipe, int], Operation | None]] = [
    HorizontalFlip.from_recipe,
    Rotation.from_recipe,
    ColorJitter.from_recipe,
    RandomErasing.from_recipe,
    Mixing.from_recipe,
]
"""Constructors from (recipe, number of classes), in the order of application; None if the recipe does not use it."""


class Draws(NamedTuple):
    """The draws of one step for one process."""

    per_image: Tensor
    """(B, K) float32, the columns of all operations next to each other."""
    widths: list[int]
    """Number of columns of each operation."""
    shared: list[Any]
    """One value for each operation."""


class Augmentation:
    """The augmentation of one process's share of each global batch."""

    def __init__(self, recipe: Recipe, num_classes: int, rank: int = 0, num_processes: int = 1):
        self._seed, self._global_batch_size = recipe.seed, recipe.global_batch_size
        made = [make(recipe, num_classes) for make in OPERATIONS]
        self.operations: list[Operation] = [operation for operation in made if operation is not None]
        share = recipe.global_batch_size // num_processes
        self._rows = slice(rank * share, (rank + 1) * share)

    def draw(self, step: int) -> Draws:
        """Draw for the global batch on the CPU, and return this process's rows: a function of (seed, operation's name,
        step)."""
        drawn = [
            operation.draw(
                rng.generator(self._seed, Stream.AUGMENT, rng.name_key(operation.name), step), self._global_batch_size
            )
            for operation in self.operations
        ]
        columns = [torch.empty(self._global_batch_size, 0), *(each for each, _ in drawn)]  # there may be no operation
        widths = [each.shape[1] for each, _ in drawn]
        return Draws(torch.cat(columns, dim=1)[self._rows], widths, [shared for _, shared in drawn])

    def apply_to(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Augment a Batch of data/loader.py that is on the device."""
        return self(batch.images, batch.labels, batch.step)

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Augment and normalize the images of a step; the preflight has fewer images than a batch.

        Args:
            images: (B, 3, S, S) uint8, channels_last as from the loader.
            targets: (B,) int64 class indices.

        Returns:
            (B, 3, S, S) float32, channels_last; and (B,) int64, or (B, C) float32 if an operation mixes images.
        """
        draws = self.draw(step)
        per_image = copy_to_device(draws.per_image[: len(images)], images.device)  # one copy for all operations
        size = CPU_CHUNK_IMAGES if images.device.type == "cpu" else CHUNK_IMAGES
        chunks = zip(images.split(size), targets.split(size), per_image.split(size), strict=True)
        parts = [self._apply_operations(*chunk, draws.widths, draws.shared) for chunk in chunks]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])

    def _apply_operations(
        self, images: Tensor, targets: Tensor, per_image: Tensor, widths: list[int], shared: list[Any]
    ) -> tuple[Tensor, Tensor]:
        columns = per_image.split(widths, dim=1) if widths else ()
        for operation, draws, value in zip(self.operations, columns, shared, strict=True):
            if images.dtype == torch.uint8 and not operation.works_on_uint8:
                images = images.to(torch.float32)
            images, targets = operation.apply(images, targets, draws, value)
        return normalize(images), targets
