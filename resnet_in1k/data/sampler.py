"""The images of each batch: a function of the seed, the epoch and the step."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from resnet_in1k.data.dataset import Source
from resnet_in1k.recipes.recipe import Recipe
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
    samples: list[Sample]


def epoch_order(source: Source, recipe: Recipe, epoch: int) -> torch.Tensor:
    """Images of an epoch in their order, (N,) int64; for a recipe with a shuffle_window `source` must be in shards."""
    generator = rng.generator(recipe.seed, Stream.ORDER, epoch)
    if recipe.sampling == "balanced":
        # N draws with replacement: all classes are equally probable, and all images of a class, as in torch's
        # WeightedRandomSampler.
        weights = torch.from_numpy(1 / np.bincount(source.labels)[source.labels])
        return torch.multinomial(weights, len(source), replacement=True, generator=generator)
    if not recipe.shuffle_window:
        return torch.randperm(len(source), generator=generator)
    # For slow random reads: shards are shuffled and read a window at a time, whose images are shuffled together.
    shard_of = torch.from_numpy(source.shard_of)
    shards = torch.randperm(int(shard_of.max()) + 1, generator=generator)
    window_of_shard = torch.empty_like(shards)
    window_of_shard[shards] = torch.arange(len(shards)) // recipe.shuffle_window
    images = torch.randperm(len(source), generator=generator)
    return images[torch.argsort(window_of_shard[shard_of[images]], stable=True)]


def repeat_index(order: torch.Tensor) -> torch.Tensor:
    """Number of earlier occurrences of each element, (N,) int64: [7, 3, 7, 7, 3] gives [0, 0, 1, 2, 1]."""
    # A stable sort puts equal elements next to each other in their order: [3, 3, 7, 7, 7], runs that start at 0 and 2.
    sorted_order, places = torch.sort(order, stable=True)
    run_lengths = torch.unique_consecutive(sorted_order, return_counts=True)[1]
    run_starts = torch.repeat_interleave(run_lengths.cumsum(0) - run_lengths, run_lengths)
    return torch.empty_like(order).scatter_(0, places, torch.arange(len(order)) - run_starts)


def train_specs(
    source: Source, counts: StepCounts, first_step: int, last_step: int, rank: int = 0
) -> Iterator[BatchSpec]:
    """Yield the batches of one process for the steps from `first_step` to `last_step`.

    Global batch k of an epoch is slice k of the epoch's order; process r takes slice r of the global batch. The images
    left over at the end of an epoch, fewer than a global batch, are dropped from that epoch.
    """
    recipe, size, repeats = counts.recipe, counts.per_process_batch_size, counts.recipe.repeated_augmentation
    order, earlier, epoch_of_order = torch.empty(0), torch.empty(0), 0
    for step in range(first_step, last_step + 1):
        epoch = counts.epoch_of(step)
        if epoch != epoch_of_order:
            order, epoch_of_order = epoch_order(source, recipe, epoch), epoch
            earlier = repeat_index(order) if recipe.sampling == "balanced" else torch.zeros_like(order)
        start = (counts.steps_into_epoch(step) - 1) * recipe.global_batch_size
        # Position p of the epoch is copy p % repeats of image p // repeats. In the batch the copies of an image are as
        # far apart as possible, because neighbors may be mixed: 0, 2, 4, 1, 3, 5 with two copies.
        positions = torch.arange(start, start + recipe.global_batch_size)
        positions = torch.cat([positions[first::repeats] for first in range(repeats)])[rank * size : (rank + 1) * size]
        images = positions // repeats
        copies = positions % repeats + earlier[images] * repeats
        samples = [Sample(epoch, *each) for each in zip(order[images].tolist(), copies.tolist(), strict=True)]
        yield BatchSpec(step, train_image_size(recipe, epoch), samples)


def eval_specs(
    num_images: int, batch_size: int, image_size: int, rank: int = 0, num_processes: int = 1
) -> Iterator[BatchSpec]:
    """Yield the batches of one process in evaluation: each image is on exactly one process, without padding."""
    indices = range(rank, num_images, num_processes)
    for number, start in enumerate(range(0, len(indices), batch_size)):
        samples = [Sample(0, index) for index in indices[start : start + batch_size]]
        yield BatchSpec(number, image_size, samples)
