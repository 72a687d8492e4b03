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


def test_a_batch_is_prepared_on_the_side_stream_that_the_step_then_waits_for(monkeypatch: pytest.MonkeyPatch):
    """The second one while the device works on the first step, for which the host does not wait."""
    log = fake_streams(monkeypatch)
    monkeypatch.setattr(prefetch, "capabilities", lambda device: Capabilities(True, True, True))
    prefetch._side_stream.cache_clear()

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
