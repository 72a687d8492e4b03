"""The images of each batch: a function of the seed, the epoch and the step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from resnet_in1k.recipes.step_counts import StepCounts, train_image_size
from resnet_in1k.utils import rng
from resnet_in1k.utils.rng import Stream


class Sample(NamedTuple):
    """One augmented view: epoch, image, copy."""

    epoch: int
    """0 in evaluation."""
    index: int
    """Position in the source."""
    copy: int = 0
    """Number of the image's earlier views in the epoch, with repeated augmentation or balanced sampling."""

    @property
    def key(self) -> tuple[int, ...]:
        """Position of its random streams; the first copy has the key of a run without repetition."""
        return tuple(self) if self.copy else (self.epoch, self.index)


class BatchSpec(NamedTuple):
    """What a loader worker needs to make one batch."""

    step: int
    """Optimizer step in training, number of the batch in evaluation."""
    image_size: int
    epoch: int
    """0 in evaluation."""
    indices: np.ndarray
    """(B,) int64, positions in the source."""
    copies: np.ndarray
    """(B,) int64, see Sample.copy."""

    @property
    def samples(self) -> list[Sample]:
        return [Sample(self.epoch, *each) for each in zip(self.indices.tolist(), self.copies.tolist(), strict=True)]


def epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """Permutation of an epoch's images, (N,) int64; a function of (seed, epoch)."""
    return torch.randperm(num_images, generator=rng.generator(seed, Stream.ORDER, epoch))


def windowed_order(shard_of: np.ndarray, window: int, seed: int, epoch: int) -> torch.Tensor:
    """Permutation of an epoch's images for slow random reads, (N,) int64: shards are shuffled and read `window` at a
    time, and the images of these shards are shuffled together.

    Args:
        shard_of: (N,) int64, the shard of each image.
    """
    generator = rng.generator(seed, Stream.ORDER, epoch)
    shards = torch.randperm(int(shard_of.max()) + 1, generator=generator)
    window_of_shard = torch.empty_like(shards)
    window_of_shard[shards] = torch.arange(len(shards)) // window
    images = torch.randperm(len(shard_of), generator=generator)
    window_of_image = window_of_shard[torch.from_numpy(shard_of)[images]]
    return images[torch.argsort(window_of_image, stable=True)]


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> torch.Tensor:
    """N draws with replacement from N images, (N,) int64; all classes are equally probable, and all images of a class,
    as in torch's WeightedRandomSampler."""
    weights = torch.from_numpy(1 / np.bincount(labels)[labels])
    return torch.multinomial(weights, len(labels), replacement=True, generator=rng.generator(seed, Stream.ORDER, epoch))


def repeat_index(order: torch.Tensor) -> torch.Tensor:
    """Number of earlier occurrences of each element, (N,) int64: [7, 3, 7, 7, 3] gives [0, 0, 1, 2, 1]."""
    # A stable sort puts equal elements next to each other in their order: [3, 3, 7, 7, 7], runs that start at 0 and 2.
    sorted_order, places = torch.sort(order, stable=True)
    run_lengths = torch.unique_consecutive(sorted_order, return_counts=True)[1]
    run_starts = torch.repeat_interleave(run_lengths.cumsum(0) - run_lengths, run_lengths)
    return torch.empty_like(order).scatter_(0, places, torch.arange(len(order)) - run_starts)


def batch_positions(start: int, size: int, repeats: int) -> torch.Tensor:
    """Positions of a global batch in an epoch, (B,) int64, where each image has `repeats` consecutive positions.

    Position p is copy p % repeats of image p // repeats. In the batch the copies of an image are as far apart as
    possible, because neighbors may be mixed: size 6, repeats 2 gives 0, 2, 4, 1, 3, 5.
    """
    positions = torch.arange(start, start + size)
    return torch.cat([positions[first::repeats] for first in range(repeats)])


@dataclass(frozen=True)
class TrainSampler:
    """The batches of one process for the steps from `first_step` to `last_step`.

    Global batch k of an epoch is slice k of the epoch's order; process r takes slice r of the global batch. The images
    left over at the end of an epoch, fewer than a global batch, are dropped from that epoch.
    """

    step_counts: StepCounts
    first_step: int
    last_step: int
    rank: int = 0
    labels: np.ndarray | None = None
    """(N,) int64; needed for balanced sampling."""
    shard_of: np.ndarray | None = None
    """(N,) int64, the shard of each image; needed for a shuffle_window."""

    def __iter__(self) -> Iterator[BatchSpec]:
        counts, recipe = self.step_counts, self.step_counts.recipe
        size, repeats = counts.per_process_batch_size, recipe.repeated_augmentation
        order, earlier, epoch_of_order = torch.empty(0), torch.empty(0), 0
        for step in range(self.first_step, self.last_step + 1):
            epoch = counts.epoch_of(step)
            if epoch != epoch_of_order:
                order, earlier = self._order(epoch)
                epoch_of_order = epoch
            start = (counts.steps_into_epoch(step) - 1) * recipe.global_batch_size
            positions = batch_positions(start, recipe.global_batch_size, repeats)
            positions = positions[self.rank * size : (self.rank + 1) * size]
            images = positions // repeats
            copies = positions % repeats + earlier[images] * repeats
            yield BatchSpec(step, train_image_size(recipe, epoch), epoch, order[images].numpy(), copies.numpy())

    def _order(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Order of an epoch, and the number of earlier occurrences of each image in it."""
        recipe = self.step_counts.recipe
        if recipe.sampling == "balanced":
            assert self.labels is not None, "balanced sampling needs the labels"
            order = balanced_order(self.labels, recipe.seed, epoch)
            return order, repeat_index(order)
        if recipe.shuffle_window:
            assert self.shard_of is not None, "a shuffle window needs shards"
            order = windowed_order(self.shard_of, recipe.shuffle_window, recipe.seed, epoch)
        else:
            order = epoch_order(self.step_counts.num_train_images, recipe.seed, epoch)
        return order, torch.zeros_like(order)


@dataclass(frozen=True)
class EvalSampler:
    """The batches of one process in evaluation: each image is on exactly one process, without padding."""

    num_images: int
    batch_size: int
    image_size: int
    rank: int = 0
    num_processes: int = 1

    def __len__(self) -> int:
        """Number of batches of this process."""
        return -(-len(range(self.rank, self.num_images, self.num_processes)) // self.batch_size)

    def __iter__(self) -> Iterator[BatchSpec]:
        indices = np.arange(self.rank, self.num_images, self.num_processes)
        for number in range(len(self)):
            part = indices[number * self.batch_size : (number + 1) * self.batch_size]
            yield BatchSpec(number, self.image_size, 0, part, np.zeros_like(part))
