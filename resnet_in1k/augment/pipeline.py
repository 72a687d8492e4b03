"""The operations of a recipe, in order, on one batch: the one way by which training images are augmented."""

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_in1k.augment import color_jitter, flip, random_erasing, rotation
from resnet_in1k.augment import mixup_cutmix as mixing
from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.operation import Arranged, Draws, Operation
from resnet_in1k.augment.packing import pack
from resnet_in1k.data.loader import Batch
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import rng
from resnet_in1k.utils.device import capabilities, device_type
from resnet_in1k.utils.rng import Stream

OPERATIONS: list[Callable[[Recipe, int], Operation | None]] = [
    flip.from_recipe,
    rotation.from_recipe,
    color_jitter.from_recipe,
    random_erasing.from_recipe,
    mixing.from_recipe,
]
"""In the order in which they are applied. Each makes its operation from (recipe, number of classes), or None: off."""

CPU_CHUNK = 4
"""Images augmented at a time on a CPU: what stays in its cache from one operation to the next is twice as fast."""


class Augmentation:
    """The augmentation of one process's share of each global batch."""

    def __init__(
        self, recipe: Recipe, num_classes: int, rank: int = 0, num_processes: int = 1, *, compile: bool = False
    ):
        """`compile`: the operations by torch.compile; not on a CPU, where that is slower."""
        self._seed, self._global_batch_size = recipe.seed, recipe.global_batch_size
        made = [make(recipe, num_classes) for make in OPERATIONS]
        self.operations: list[Operation] = [operation for operation in made if operation is not None]
        share = recipe.global_batch_size // num_processes
        self._rows = slice(rank * share, (rank + 1) * share)
        self._is_compiled = compile and device_type() != "cpu"
        self._operate = torch.compile(self._apply_operations) if self._is_compiled else self._apply_operations

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A training batch on the device, as the step takes it: images and targets, see `apply`."""
        rows = slice(len(batch.labels))  # all of this process's share, but in the preflight
        return self.apply(batch.images, batch.labels, [_take(draws, rows) for draws in self.draw(batch.step)])

    def draw(self, step: int) -> list[Draws]:
        """By operation, what was drawn for this process's share: a function of (seed, operation's name, step)."""
        everything = [
            operation.draw(
                rng.generator(self._seed, Stream.AUGMENT, rng.name_key(operation.name), step), self._global_batch_size
            )
            for operation in self.operations
        ]
        return [_take(draws, self._rows) for draws in everything]

    def apply(self, images: Tensor, targets: Tensor, draws: list[Draws]) -> tuple[Tensor, Tensor]:
        """Augment and normalize.

        Args:
            images: (B, 3, S, S) uint8, in channels_last if from the loader.
            targets: (B,) int64 class indices.
            draws: for these B images, as `draw` gives them.

        Returns:
            (B, 3, S, S) float32, channels_last; and (B,) int64, or (B, C) float32 if an operation mixes images.
        """
        if images.device.type != "cpu":
            # What is arranged has groups of other sizes in each batch, and so would be compiled for each.
            pin = capabilities(images.device.type).pinned_memory
            packed = pack(draws if self._is_compiled else self.arrange(draws), pin=pin)
            return self.apply_arranged(images, targets, packed.to(images.device))
        if len(images) <= CPU_CHUNK:
            return self.apply_arranged(images, targets, self.arrange(draws))
        chunks = [slice(start, start + CPU_CHUNK) for start in range(0, len(images), CPU_CHUNK)]
        parts = [self.apply(images[c], targets[c], [_take(each, c) for each in draws]) for c in chunks]
        return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])

    def arrange(self, draws: list[Draws]) -> list[Arranged]:
        """By operation, the draws as its `apply` takes them, still on the CPU."""
        pairs = zip(self.operations, draws, strict=True)
        return [operation.arrange(each) if hasattr(operation, "arrange") else dict(each) for operation, each in pairs]

    def apply_arranged(self, images: Tensor, targets: Tensor, arranged: list[Arranged]) -> tuple[Tensor, Tensor]:
        """As `apply`, with draws that are arranged and on the images' device; the host does not wait for it."""
        pixels, targets = self._operate(images, targets, arranged)
        return normalize(pixels), targets

    def _apply_operations(self, images: Tensor, targets: Tensor, arranged: list[Arranged]) -> tuple[Tensor, Tensor]:
        pixels = images.to(torch.float32)
        for operation, drawn in zip(self.operations, arranged, strict=True):
            pixels, targets = operation.apply(pixels, targets, drawn)
        return pixels, targets


def _take(draws: Draws, rows: slice) -> Draws:
    return {name: values[rows] for name, values in draws.items()}
