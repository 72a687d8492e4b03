"""Prefetching on the CPU, and on a device whose streams write down what is done with them."""

import pytest
import torch
from helpers.fake_device import META, fake_streams
from helpers.loading import train_batches

from resnet_in1k.data import loader as prefetch
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.loader import Batch, prefetch_to_device
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.device import Capabilities


def test_batches_are_prepared_in_order_when_their_tensors_are_asked_for(source: Source, tiny: Recipe):
    """So that on a CPU the time of preparing them is not counted as waiting for the loader."""
    prepared = []

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        prepared.append(batch.step)
        return batch.images.float() + 1, batch.labels

    batches = train_batches(source, tiny, 3)
    for batch, prefetched in zip(batches, prefetch_to_device(batches, torch.device("cpu"), prepare), strict=True):
        assert prepared == list(range(1, batch.step))
        assert prefetched.bad_images is batch.bad_images
        images, labels = prefetched.tensors()
        assert torch.equal(images, batch.images.float() + 1)
        assert torch.equal(labels, batch.labels)


def batches(number: int) -> list[Batch]:
    labels = torch.zeros(2, dtype=torch.int64)
    return [Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), labels, labels, step=step + 1) for step in range(number)]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with the streams of a device that has them."""
    log = fake_streams(monkeypatch)
    monkeypatch.setattr(prefetch, "capabilities", lambda device: Capabilities(True, True, True))
    prefetch._side_stream.cache_clear()
    yield log
    prefetch._side_stream.cache_clear()


def test_a_batch_is_prepared_on_the_side_stream_that_the_step_then_waits_for(log: list[str]):
    """The second one while the device works on the first step, for which the host does not wait."""

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        assert batch.images.device == META
        log.append(f"prepare {batch.step}")
        return batch.images.float(), batch.labels

    for number, prefetched in enumerate(prefetch_to_device(batches(2), META, prepare), start=1):
        prefetched.tensors()
        log.append(f"step {number}")
    expected = []
    for number in (1, 2):
        expected += ["on side", f"prepare {number}", "off side", "compute waits for side"]
        expected += ["(2, 3, 4, 4) used on compute", "(2,) used on compute", f"step {number}"]
    assert log == expected


def test_all_prefetching_shares_one_side_stream(log: list[str], monkeypatch: pytest.MonkeyPatch):
    """The caching allocator would keep memory for each."""
    made, make = [], torch.Stream
    monkeypatch.setattr(torch, "Stream", lambda device: made.append(device) or make(device))
    for _ in range(3):
        assert len(list(prefetch_to_device(batches(1), META, lambda batch: (batch.images,)))) == 1
    assert made == [META]


def test_without_streams_a_batch_is_prepared_when_its_tensors_are_asked_for(log: list[str], monkeypatch):
    monkeypatch.setattr(prefetch, "capabilities", lambda device: Capabilities(False, True, True))
    (prefetched,) = prefetch_to_device(batches(1), META, lambda batch: log.append("prepare") or (batch.images,))
    assert log == []
    (images,) = prefetched.tensors()
    assert (images.device, log) == (META, ["prepare"])
