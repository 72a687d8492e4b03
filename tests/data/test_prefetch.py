"""Prefetching on the CPU; on a GPU the same, beside the step before."""

import torch
from helpers.loading import train_batches

from resnet_in1k.data.loader import Batch
from resnet_in1k.data.prefetch import prefetch_to_device
from resnet_in1k.data.source import Source
from resnet_in1k.recipes.recipe import Recipe


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
