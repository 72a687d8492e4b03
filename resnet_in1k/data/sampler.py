"""Which images are in which batch: a function of the seed, the epoch and the step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from resnet_in1k.recipes.step_counts import StepCounts, train_image_size
from resnet_in1k.utils import rng
from resnet_in1k.utils.rng import Stream


class Sample(NamedTuple):
    """Whose crop and augmentation are drawn."""

    epoch: int
    """0 in evaluation."""
    index: int
    """Position in the source."""
    copy: int = 0
    """With repeated augmentation, which of the image's copies in the epoch."""

    @property
    def key(self) -> tuple[int, ...]:
        """Of its random streams; that of the first copy is as without repeated augmentation."""
        return tuple(self) if self.copy else (self.epoch, self.index)


class BatchSpec(NamedTuple):
    """What a loader worker needs to make one batch."""

    step: int
    """Optimizer step in training, number of the batch in evaluation."""
    image_size: int
    samples: list[Sample]


def epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of an epoch, (N,) int64, a permutation that depends on (seed, epoch) alone."""
    return torch.randperm(num_images, generator=rng.generator(seed, Stream.ORDER, epoch))


def windowed_order(shard_of: np.ndarray, window: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of an epoch, (N,) int64: shards come shuffled, `window` of them at a time, and their images shuffled
    among themselves. It depends on (seed, epoch) alone, and on which image is in which shard.

    Args:
        shard_of: (N,) int64.
    """
    generator = rng.generator(seed, Stream.ORDER, epoch)
    shards = torch.randperm(int(shard_of.max()) + 1, generator=generator)
    window_of_shard = torch.empty_like(shards)
    window_of_shard[shards] = torch.arange(len(shards)) // window
    images = torch.randperm(len(shard_of), generator=generator)
    window_of_image = window_of_shard[torch.from_numpy(shard_of)[images]]
    return images[torch.argsort(window_of_image, stable=True)]


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> torch.Tensor:
    """As many draws as there are images, (N,) int64, with replacement: all classes are equally probable, and all images
    of a class; as torch's WeightedRandomSampler draws."""
    weights = torch.from_numpy(1 / np.bincount(labels)[labels])
    return torch.multinomial(weights, len(labels), replacement=True, generator=rng.generator(seed, Stream.ORDER, epoch))


def occurrences(order: torch.Tensor) -> torch.Tensor:
    """For each place of an order how often its image came before, (N,) int64."""
    by_image = torch.argsort(order, stable=True)
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[1:] = order[by_image][1:] != order[by_image][:-1]
    places = torch.arange(len(order))
    started_at = torch.where(is_first, places, 0).cummax(dim=0).values
    return torch.empty_like(order).scatter_(0, by_image, places - started_at)


def samples_of_batch(
    order: torch.Tensor, epoch: int, start: int, size: int, repeats: int, repeat_index: torch.Tensor | None = None
) -> list[Sample]:
    """The global batch from position `start` on of an epoch in which each place of `order` comes `repeats` times.

    `repeat_index`: for each place how often its image came before; None if each comes once.

    The copies of an image are consecutive in the epoch, as in torchvision's RASampler, so that they are in one batch;
    in it they are as far from one another as can be: neighbors, which may be mixed, are other images.
    """
    places = torch.arange(start, start + size)
    if repeats > 1:
        places = torch.cat([places[first::repeats] for first in range(repeats)])
    chosen, copies = places // repeats, places % repeats
    if repeat_index is not None:
        copies = copies + repeat_index[chosen] * repeats
    return [Sample(epoch, index, copy) for index, copy in zip(order[chosen].tolist(), copies.tolist(), strict=True)]


@dataclass(frozen=True)
class TrainOrder:
    """The batches of one process for the steps from `first_step` to `last_step`.

    Global batch k of an epoch is the k-th slice of its order; process r takes the r-th slice of the global batch. The
    images left over at an epoch's end, fewer than a global batch, are dropped from that epoch.
    """

    schedule: StepCounts
    first_step: int
    last_step: int
    rank: int = 0
    labels: np.ndarray | None = None
    """Of the training images, (N,) int64; read by a recipe with balanced sampling."""
    shard_of: np.ndarray | None = None
    """In which shard each of them is, (N,) int64; read by a recipe with a shuffle_window."""

    def __iter__(self) -> Iterator[BatchSpec]:
        schedule, recipe = self.schedule, self.schedule.recipe
        size = schedule.per_process_batch_size
        order, repeat_index, order_epoch = torch.empty(0), None, 0
        for step in range(self.first_step, self.last_step + 1):
            epoch = schedule.epoch_of(step)
            if epoch != order_epoch:
                order, repeat_index = self._order(epoch)
                order_epoch = epoch
            whole, repeats = recipe.global_batch_size, recipe.repeated_augmentation
            start = (schedule.steps_into_epoch(step) - 1) * whole
            samples = samples_of_batch(order, epoch, start, whole, repeats, repeat_index)
            samples = samples[self.rank * size : (self.rank + 1) * size]
            yield BatchSpec(step, train_image_size(recipe, epoch), samples)

    def _order(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of an epoch, and how often each place's image came before in it."""
        seed = self.schedule.recipe.seed
        if self.schedule.recipe.sampling == "balanced":
            assert self.labels is not None, "balanced sampling needs the labels"
            order = balanced_order(self.labels, seed, epoch)
            return order, occurrences(order)
        if window := self.schedule.recipe.shuffle_window:
            assert self.shard_of is not None, "a window needs shards"
            return windowed_order(self.shard_of, window, seed, epoch), None
        return epoch_order(self.schedule.num_train_images, seed, epoch), None


@dataclass(frozen=True)
class EvalOrder:
    """The batches of one process, each image of the split on exactly one process, without padding."""

    num_images: int
    batch_size: int
    image_size: int
    rank: int = 0
    num_processes: int = 1

    def __len__(self) -> int:
        return -(-len(self._indices) // self.batch_size)

    def __iter__(self) -> Iterator[BatchSpec]:
        for number, start in enumerate(range(0, len(self._indices), self.batch_size)):
            samples = [Sample(0, index) for index in self._indices[start : start + self.batch_size]]
            yield BatchSpec(number, self.image_size, samples)

    @property
    def _indices(self) -> range:
        return range(self.rank, self.num_images, self.num_processes)
