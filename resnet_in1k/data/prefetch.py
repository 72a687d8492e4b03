"""Copying batches to the device and preparing them there, beside the step before."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from resnet_in1k.data.loader import Batch
from resnet_in1k.utils.device import capabilities

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Prefetched:
    """A batch on its way to the device."""

    bad_images: dict[int, str]
    tensors: Callable[[], Tensors]
    """Gives the prepared tensors to the current stream; to be called before the next batch is asked for."""


def prefetch_to_device(
    batches: Iterable[Batch], device: torch.device, prepare: Callable[[Batch], Tensors]
) -> Iterator[Prefetched]:
    """Copy each batch to the device and prepare it there.

    Waiting for the next item is waiting for the loader; what calling its `tensors` costs is work of the device.

    Where the device has streams, both happen on a side stream. As the host runs ahead of the device, it asks for the
    next batch while the device still computes the step before: copy and augmentation run beside that step, not after
    it.
    """
    if not capabilities(device.type).streams:
        for batch in batches:
            yield Prefetched(batch.bad_images, functools.partial(prepare, batch.to(device)))
        return

    side_stream = _side_stream(device)
    for batch in batches:
        with side_stream:
            prepared = prepare(batch.to(device))
        yield Prefetched(batch.bad_images, functools.partial(_on_compute_stream, prepared, side_stream))


@functools.cache
def _side_stream(device: torch.device) -> torch.Stream:
    # One for training and every evaluation: the caching allocator keeps freed blocks per stream.
    return torch.Stream(device)


def _on_compute_stream(prepared: Tensors, side_stream: torch.Stream) -> Tensors:
    compute_stream = torch.accelerator.current_stream(side_stream.device)
    compute_stream.wait_stream(side_stream)
    for tensor in prepared:
        tensor.record_stream(compute_stream)  # else its memory could be reused while the step still reads it
    return prepared
