"""The order of images: the same on any number of processes, from any step, in any run of the same seed."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.sampler import BatchSpec, Sample, epoch_order, eval_specs, train_specs
from resnet_in1k.data.tar_shards import ShardSource
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.utils import rng


def images(number: int, **fields: np.ndarray) -> Source:
    """Images of one class, which are not read."""
    known = {"name": "x", "split": "train", "class_names": ("a",), "labels": np.zeros(number, dtype=np.int64)}
    return Source(**known | fields)


def order_of_50(recipe: Recipe, first_step: int = 1, rank: int = 0, num_processes: int = 1) -> list[BatchSpec]:
    """Eight steps on 50 images, four an epoch."""
    recipe = replace(recipe, global_batch_size=12)
    return list(train_specs(images(50), StepCounts(recipe, num_processes, 1, 50), first_step, 8, rank))


def global_batches(recipe: Recipe, num_processes: int) -> list[list[Sample]]:
    ranks = [order_of_50(recipe, rank=rank, num_processes=num_processes) for rank in range(num_processes)]
    return [list(chain(*(batch.samples for batch in parts))) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_processes", [2, 3])
def test_global_batches_do_not_depend_on_the_number_of_processes(tiny: Recipe, num_processes: int):
    assert global_batches(tiny, num_processes) == global_batches(tiny, 1)


def test_an_epoch_has_each_image_at_most_once_and_the_next_epoch_another_order(tiny: Recipe):
    steps = global_batches(tiny, 1)
    assert [len(samples) for samples in steps] == [12] * 8
    for epoch, batches in ((1, steps[:4]), (2, steps[4:])):
        samples = list(chain(*batches))
        assert {sample.epoch for sample in samples} == {epoch}
        assert len({sample.index for sample in samples}) == 48
    assert [sample.index for sample in steps[0]] != [sample.index for sample in steps[4]]


@pytest.mark.parametrize("first_step", [3, 5, 8])
def test_the_order_can_start_at_any_step(tiny: Recipe, first_step: int):
    ours, theirs = order_of_50(tiny, first_step), order_of_50(tiny)[first_step - 1 :]
    assert [batch.samples for batch in ours] == [batch.samples for batch in theirs]
    assert [batch.step for batch in order_of_50(tiny, first_step)] == list(range(first_step, 9))


def test_epoch_order_is_a_permutation_of_its_own(tiny: Recipe):
    recipe = replace(tiny, seed=0)
    order = epoch_order(images(1000), recipe, epoch=1)
    assert sorted(order.tolist()) == list(range(1000))
    assert not torch.equal(order, epoch_order(images(1000), replace(recipe, seed=1), epoch=1))
    # The first images of ImageNet's first epoch: were these to change, no run could be resumed or reproduced.
    assert epoch_order(images(1_281_167), recipe, epoch=1)[:4].tolist() == [850991, 147023, 218125, 826740]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_images", "batch_size"), [(250, 64), (7, 3), (5, 128), (24, 8)])
def test_evaluation_has_each_image_once_on_any_number_of_processes(
    num_images: int, batch_size: int, num_processes: int
):
    orders = [list(eval_specs(num_images, batch_size, 64, rank, num_processes)) for rank in range(num_processes)]
    batches = [batch for order in orders for batch in order]
    assert sorted(sample.index for batch in batches for sample in batch.samples) == list(range(num_images))
    assert all(1 <= len(batch.samples) <= batch_size and batch.image_size == 64 for batch in batches)
    assert all([batch.step for batch in order] == list(range(len(order))) for order in orders)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("repeats", [2, 3, 4, 5])
def test_repeated_augmentation_keeps_the_epochs_length(tiny: Recipe, repeats: int, num_processes: int):
    """As torchvision's RASampler: consecutive copies, so that a batch of 12 has 12 / repeats different images."""
    repeated = replace(tiny, repeated_augmentation=repeats)
    batches = global_batches(repeated, num_processes)
    assert [len(samples) for samples in batches] == [12] * 8
    seen = list(chain(*batches[:4]))
    order = epoch_order(images(50), tiny, 1).tolist()
    assert sorted(seen) == sorted([(1, index, copy) for index in order for copy in range(repeats)][:48])
    for samples in batches:
        pairs = zip(samples[::2], samples[1::2], strict=True)
        assert all(one.index != other.index for one, other in pairs), "neighbors, which may be mixed, differ"
        assert len({sample.index for sample in samples}) <= -(-12 // repeats) + 1


def test_balanced_sampling_draws_as_torchs_weighted_sampler(tiny: Recipe):
    """Nine images of a class and one of another: half of the draws are of the one."""
    source, recipe = images(10, labels=np.array([0] * 9 + [1])), replace(tiny, sampling="balanced", seed=3)
    order = epoch_order(source, recipe, 2)
    sampler = WeightedRandomSampler([1 / 9] * 9 + [1.0], 10, generator=rng.generator(3, rng.Stream.ORDER, 2))
    assert order.tolist() == list(sampler)
    drawn = torch.cat([epoch_order(source, recipe, epoch) for epoch in range(400)])
    assert (drawn == 9).double().mean() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(drawn[:10], drawn[10:20])


def test_an_image_that_is_drawn_again_is_another_copy(tiny: Recipe):
    """So that its crops differ; on two processes the same as on one."""
    source, recipe = images(50, labels=np.array([0] * 46 + [1] * 4)), replace(tiny, sampling="balanced", epochs=1)
    one, first, second = (
        list(train_specs(source, StepCounts(recipe, num_processes, 1, 50), 1, 6, rank))
        for rank, num_processes in ((0, 1), (0, 2), (1, 2))
    )
    samples = list(chain(*(batch.samples for batch in one)))
    assert samples == list(chain(*(a.samples + b.samples for a, b in zip(first, second, strict=True))))
    assert len(set(samples)) == len(samples) == 48
    copies = {index: [sample.copy for sample in samples if sample.index == index] for _, index, _ in samples}
    assert all(found == list(range(len(found))) for found in copies.values())
    assert len(copies) < 40


def test_a_window_of_shards_is_shuffled_at_a_time(tiny: Recipe):
    """Five shards of unequal size, two at a time: each image once, and no window begins before the last has ended."""
    shard_of = np.repeat(np.arange(5), [3, 5, 2, 7, 4])[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    source = ShardSource(**vars(images(21)), shards=(), shard_of=shard_of, offsets=shard_of, sizes=shard_of)
    seen = set()
    for epoch in (1, 2, 3, 4):
        order = epoch_order(source, replace(tiny, shuffle_window=2), epoch)
        assert sorted(order.tolist()) == list(range(21))
        shards = shard_of[order.numpy()].tolist()
        assert np.count_nonzero(np.diff(shards)) > 4, "the images of a window are shuffled together"
        windows = []
        while shards:
            window = list(dict.fromkeys(shards))[:2]  # the first two that come
            rest = [shard for shard in shards if shard not in window]
            assert shards[len(shards) - len(rest) :] == rest
            windows.append(window)
            shards = rest
        assert [len(window) for window in windows] == [2, 2, 1]
        seen.add(tuple(order.tolist()))
    assert len(seen) == 4
