"""Batches, the same with any number of workers, and their way to the device."""

import multiprocessing
import time
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from helpers.loading import packed_source, specs_of, train_batches, train_loader

from resnet_in1k.data.crop import TrainCrop
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import decode
from resnet_in1k.data.loader import Batch, prefetch_to_device
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.errors import ProcessError


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.step == other.step
        for name in ("images", "labels", "indices"):
            assert torch.equal(getattr(mine, name), getattr(other, name)), name


def test_batches_are_the_crops_of_the_ordered_images_with_their_labels(source: Source, tiny: Recipe):
    """Against decoding and cropping image by image."""
    order = list(specs_of(source, tiny, 6, first_step=3))
    batches = train_batches(source, tiny, 6, first_step=3)
    assert [batch.step for batch in batches] == [3, 4, 5, 6]
    crop = TrainCrop(tiny)
    for batch, spec in zip(batches, order, strict=True):
        assert (batch.images.dtype, batch.images.shape, batch.bad_images) == (torch.uint8, (8, 3, 32, 32), {})
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.indices.tolist() == [sample.index for sample in spec.samples]
        assert np.array_equal(batch.labels.numpy(), source.labels[batch.indices.numpy()])
        for image, sample in zip(batch.images, spec.samples, strict=True):
            assert torch.equal(image, next(crop([decode(source.read(sample.index))], [sample], 32)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(
    source: Source, tiny: Recipe, monkeypatch: pytest.MonkeyPatch, num_workers: int
):
    """Over several rounds of the slots that workers write to; all batches are kept. However slow the copy out of a
    slot: the worker is idle then, and has been given the next batch."""
    expected, copy = train_batches(source, tiny, 40), np.copyto

    def copy_late(*arguments: Any) -> None:
        time.sleep(0.01)
        copy(*arguments)

    monkeypatch.setattr(np, "copyto", copy_late)
    assert_same_batches(train_batches(source, tiny, 40, num_workers=num_workers), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_taken", [0, 7, 20])
def test_a_second_order_is_right_however_far_the_first_was_taken(
    source: Source, tiny: Recipe, num_workers: int, num_taken: int
):
    """As by a resumed preflight or a run that is stopped: batches of the first order are still under way."""
    expected = train_batches(source, tiny, 24, first_step=5)
    with train_loader(source, tiny, num_workers=num_workers) as loader:
        workers = {process.pid for process in multiprocessing.active_children()}
        first = loader.batches(specs_of(source, tiny, 20))
        taken = list(islice(first, num_taken))
        second = list(loader.batches(specs_of(source, tiny, 24, first_step=5)))
        assert {process.pid for process in multiprocessing.active_children()} == workers
    assert_same_batches(second, expected)
    assert [batch.step for batch in taken] == list(range(1, num_taken + 1))


def test_the_image_size_may_change_from_batch_to_batch(source: Source, tiny: Recipe):
    """In the same slots, sized for the largest: smaller after larger, and larger after smaller."""
    small, large = replace(tiny, image_size=32), replace(tiny, image_size=96)
    with train_loader(source, large, num_workers=2) as loader:
        order = zip(specs_of(source, small, 16), specs_of(source, large, 16), strict=True)
        batches = list(loader.batches(chain(*order)))
    assert_same_batches(batches[::2], train_batches(source, small, 16))
    assert_same_batches(batches[1::2], train_batches(source, large, 16))


@pytest.mark.parametrize("ends", ["at its end", "half way", "by an error", "before its start"])
def test_no_worker_is_left_after_the_with(source: Source, tiny: Recipe, ends: str):
    before = multiprocessing.active_children()
    if ends == "by an error":
        source = packed_source([*[source.read(0).tobytes()] * 7, b"no image"])
    with train_loader(source, tiny, num_workers=2) as loader:
        workers = [process for process in multiprocessing.active_children() if process not in before]
        assert len(workers) == 2
        batches = loader.batches(specs_of(source, tiny, 4))
        if ends == "at its end":
            assert len(list(batches)) == 4
        elif ends == "half way":
            next(batches)
        elif ends == "by an error":
            with pytest.raises(ProcessError, match="cannot be read as an image"):
                next(batches)
    assert not any(process.is_alive() for process in workers)
    assert multiprocessing.active_children() == before


def test_batches_are_prepared_in_order_when_their_tensors_are_asked_for(source: Source, tiny: Recipe):
    """So that on a CPU the time of preparing them is not counted as waiting for the loader."""
    prepared = []

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        prepared.append(batch.step)
        return batch.images.float() + 1, batch.labels

    batches = train_batches(source, tiny, 3)
    for batch, (bad_images, take) in zip(
        batches, prefetch_to_device(batches, torch.device("cpu"), prepare), strict=True
    ):
        assert prepared == list(range(1, batch.step))
        assert bad_images is batch.bad_images
        images, labels = take()
        assert torch.equal(images, batch.images.float() + 1)
        assert torch.equal(labels, batch.labels)
