"""Batches in host memory, decoded ahead by worker processes.

Workers do only what must happen per file: decode and crop. What can be done for a whole batch at once is done on the
device, by `augment`. No float tensor crosses a process border.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from resnet_in1k.data.crop import Crop
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import IfBad, read_image
from resnet_in1k.data.sampler import BatchSpec, Sample
from resnet_in1k.utils.device import capabilities, device_type
from resnet_in1k.utils.errors import ProcessError
from resnet_in1k.utils.pool import (
    check_workers_can_start,
    init_worker,
    shared_bytes,
    translate_worker_errors,
    worker_context,
)

PREFETCH_FACTOR = 4
"""Batches under way per worker."""
GROUP_IMAGES, GROUP_BYTES = 16, 16 << 20
"""A worker decodes so many images, or so many bytes of pixels, before it crops them: one after the other, decoder and
resizing evict each other's code and tables from the CPU's caches, which takes a tenth to a fifth of the time."""


@dataclass(frozen=True)
class Batch:
    """`images` (B, 3, S, S) uint8 in channels_last; `labels` and `indices` (positions in the source), (B,) int64."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    step: int = 0
    """Optimizer step in training, number of the batch in evaluation."""
    bad_images: dict[int, str] = field(default_factory=dict)
    """The images that could not be read while making this batch, by index, with the decoder's reasons."""

    @property
    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.images, self.labels, self.indices

    def to(self, device: torch.device) -> "Batch":
        """The host does not wait where the tensors are pinned; from other memory only a blocking copy is safe."""
        tensors = (tensor.to(device, non_blocking=tensor.is_pinned()) for tensor in self._tensors)
        return Batch(*tensors, self.step, self.bad_images)


Job = tuple[int, BatchSpec]
"""A slot of shared memory, and what to write to it."""
Filled = tuple[int, BatchSpec, np.ndarray, np.ndarray, dict[int, str]]
"""The same, with the labels and indices of the images in the slot, and the bad images."""


class Loader:
    """Makes batches of a source; its workers live as long as the body of its `with`.

    The workers write into a ring of slots that is shared with them once, at the start. Fresh shared memory for each
    batch, as a plain DataLoader takes it, costs a page fault every 4 KiB: a tenth of a worker's time, measured. Each
    batch is copied out of its slot, so it is the caller's to keep.

    Enter it before the process group exists: a process forked while another thread, such as Gloo's, holds a lock can
    wait for that lock for ever (https://github.com/python/cpython/issues/112275).
    """

    def __init__(
        self,
        source: Source,
        crop: Crop,
        *,
        batch_size: int,
        largest_image_size: int,
        num_workers: int,
        if_bad: IfBad = "fail",
    ):
        """`num_workers` 0: everything happens in this process, for debugging."""
        self.batch_size, self._num_workers = batch_size, num_workers
        self._batch_bytes = batch_size * 3 * largest_image_size**2
        self._num_slots = _num_slots(num_workers)
        self._source, self._crop, self._if_bad = source, crop, if_bad
        self._jobs = _Jobs(self._num_slots)

    def __enter__(self) -> "Loader":
        self._slots = shared_bytes((self._num_slots, self._batch_bytes))
        self._loader = DataLoader(
            SlotWriter(self._source, self._crop, self._slots, self._if_bad),
            batch_sampler=self._jobs,  # type: ignore[arg-type]
            collate_fn=_identity,
            num_workers=self._num_workers,
            prefetch_factor=PREFETCH_FACTOR if self._num_workers else None,
            persistent_workers=self._num_workers > 0,
            multiprocessing_context=worker_context() if self._num_workers else None,
            worker_init_fn=functools.partial(init_worker, parent=os.getpid()),
        )
        if self._num_workers:
            check_workers_can_start()
            iter(self._loader)  # starts the workers; there are no jobs yet
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_workers:  # which ignore the SIGTERM that torch would send them at exit
            self._loader._iterator._shutdown_workers()

    def batches(self, order: Iterable[BatchSpec]) -> Iterator[Batch]:
        """One after the other. After a second call, the iterator of the first must not be used any more.

        Raises:
            ProcessError: for a worker's death or a file that cannot be read (BadImageError: that cannot be decoded).
        """
        self._jobs.order = order
        pin = capabilities(device_type()).pinned_memory  # not asked before, as it initializes the device: workers fork
        with translate_worker_errors():
            for result in self._loader:
                # An error that stops the run comes as a value: raised in a worker it would carry that one's traceback.
                if isinstance(result, ProcessError):
                    raise result
                yield self._copied(result, pin)

    def _copied(self, filled: Filled, pin: bool) -> Batch:
        slot, spec, labels, indices, bad_images = filled
        images = torch.empty((len(labels), spec.image_size, spec.image_size, 3), dtype=torch.uint8, pin_memory=pin)
        # NumPy copies in this thread alone: the others are computing.
        np.copyto(images.numpy(), _slot_view(self._slots, slot, len(labels), spec.image_size).numpy())
        small = [torch.from_numpy(array) for array in (labels, indices)]
        small = [tensor.pin_memory() if pin else tensor for tensor in small]
        return Batch(images.permute(0, 3, 1, 2), *small, spec.step, bad_images)


class SlotWriter(Dataset):
    """What a worker does: read, decode and crop the images of a batch, straight into a slot of shared memory."""

    def __init__(self, source: Source, crop: Crop, slots: torch.Tensor, if_bad: IfBad):
        self._source, self._crop, self._slots, self._if_bad = source, crop, slots, if_bad

    def __getitems__(self, job: Job) -> Filled | ProcessError:
        slot, spec = job
        images = _slot_view(self._slots, slot, len(spec.samples), spec.image_size).permute(0, 3, 1, 2)
        indices = np.empty(len(spec.samples), dtype=np.int64)
        bad_images: dict[int, str] = {}
        try:
            for group in self._decoded(spec.samples, images, indices, bad_images):
                # Drawn for the samples, not for images that replace theirs, which may be in this batch themselves.
                samples = [spec.samples[row] for row in group]
                squares = self._crop.many(list(group.values()), samples, spec.image_size)
                for row, square in zip(group, squares, strict=True):
                    images[row].copy_(square)
        except ProcessError as error:
            return error
        return slot, spec, self._source.labels[indices], indices, bad_images

    def _decoded(
        self, samples: list[Sample], images: torch.Tensor, indices: np.ndarray, bad_images: dict[int, str]
    ) -> Iterator[dict[int, torch.Tensor]]:
        """The images of some samples at a time, by row of the batch; those that stay blank are written at once."""
        group: dict[int, torch.Tensor] = {}
        for row, sample in enumerate(samples):
            indices[row], image = read_image(self._source, sample.index, self._if_bad, bad_images)
            if image is None:
                images[row].zero_()
            else:
                group[row] = image
            if len(group) == GROUP_IMAGES or sum(each.nbytes for each in group.values()) >= GROUP_BYTES:
                yield group
                group = {}
        if group:
            yield group


class _Jobs:
    """The batches of the current order with the slots they are written to, in turn."""

    def __init__(self, num_slots: int):
        self.order: Iterable[BatchSpec] = ()
        self._num_slots = num_slots

    def __iter__(self) -> Iterator[Job]:
        for number, spec in enumerate(self.order):
            yield number % self._num_slots, spec


def _identity(result: Any) -> Any:
    return result


def _slot_view(slots: torch.Tensor, slot: int, num_images: int, image_size: int) -> torch.Tensor:
    """(B, S, S, 3): pixel by pixel, as images are decoded and as the network takes them."""
    return slots[slot, : num_images * image_size**2 * 3].view(num_images, image_size, image_size, 3)


def _num_slots(num_workers: int) -> int:
    # The DataLoader asks for one more batch before it returns one: that must not be written where this one lies.
    return PREFETCH_FACTOR * num_workers + 1


def shared_bytes_needed(num_workers: int, batch_size: int, image_size: int) -> int:
    """Memory that a loader shares with its workers."""
    return _num_slots(num_workers) * batch_size * 3 * image_size**2


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
