"""Load batches in worker processes and copy them to the device.

Workers do only what must happen for each file: decode and crop. Everything that works on a complete batch happens on
the device, in `augment`. Only uint8 pixels pass between processes.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from resnet_in1k.data.crop import Crop
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import IfBad, read_image
from resnet_in1k.data.sampler import BatchSpec, Sample
from resnet_in1k.utils.device import capabilities, device_type
from resnet_in1k.utils.errors import ProcessError, UserError
from resnet_in1k.utils.pool import (
    init_worker,
    shared_bytes,
    translate_worker_errors,
    worker_context,
)

PREFETCH_FACTOR = 4
"""Batches in preparation per worker."""
GROUP_IMAGES, GROUP_BYTES = 16, 16 << 20
"""Images, or bytes of pixels, that a worker decodes before it crops them. Alternating for each image would evict code
and tables from the CPU's caches, which costs 10 to 20% of the time."""


@dataclass(frozen=True)
class Batch:
    images: torch.Tensor
    """(B, 3, S, S) uint8, channels_last."""
    labels: torch.Tensor
    """(B,) int64."""
    indices: torch.Tensor
    """(B,) int64, positions in the source."""
    step: int = 0
    """Optimizer step in training, number of the batch in evaluation."""
    bad_images: dict[int, str] = field(default_factory=dict)
    """Decoder errors by position in the source, for images that could not be read for this batch."""

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device; the host does not wait if the tensors are pinned."""
        tensors = (self.images, self.labels, self.indices)
        # From memory that is not pinned only a blocking copy is safe.
        copies = (tensor.to(device, non_blocking=tensor.is_pinned()) for tensor in tensors)
        return Batch(*copies, self.step, self.bad_images)


class Filled(NamedTuple):
    """A slot of shared memory that a worker has filled."""

    slot: int
    spec: BatchSpec
    labels: np.ndarray
    indices: np.ndarray
    bad_images: dict[int, str]


class _BatchSampler:
    """The specs of the current call of `Loader.batches`, each with the slot to write it to.

    A DataLoader is bound to one batch sampler for its life and iterates over it again for each call of `batches`. So
    this one sampler is given the new specs before each iteration.
    """

    def __init__(self, num_slots: int):
        self.specs: Iterable[BatchSpec] = ()
        self._num_slots = num_slots

    def __iter__(self) -> Iterator[tuple[int, BatchSpec]]:
        for number, spec in enumerate(self.specs):
            yield number % self._num_slots, spec


class Loader:
    """Make batches of a source; the workers live as long as the body of its `with`.

    Workers write into a ring of slots of shared memory, which is allocated once. A plain DataLoader allocates shared
    memory for each batch and pays a page fault every 4 KiB, a tenth of a worker's time (measured). Each batch is copied
    out of its slot, so the caller may keep it.

    Enter it before the process group exists: in a process forked next to another thread, such as Gloo's, a lock that
    this thread holds is never released (https://github.com/python/cpython/issues/112275).
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
        """With `num_workers` 0 everything happens in this process, for debugging."""
        self.batch_size, self._num_workers = batch_size, num_workers
        self._batch_bytes = batch_size * 3 * largest_image_size**2
        self._num_slots = _num_slots(num_workers)
        self._source, self._crop, self._if_bad = source, crop, if_bad
        self._sampler = _BatchSampler(self._num_slots)

    def __enter__(self) -> "Loader":
        self._slots = shared_bytes((self._num_slots, self._batch_bytes))
        self._loader = DataLoader(
            SlotWriter(self._source, self._crop, self._slots, self._if_bad),
            batch_sampler=self._sampler,  # type: ignore[arg-type]
            collate_fn=_identity,
            num_workers=self._num_workers,
            prefetch_factor=PREFETCH_FACTOR if self._num_workers else None,
            persistent_workers=self._num_workers > 0,
            multiprocessing_context=worker_context() if self._num_workers else None,
            worker_init_fn=functools.partial(init_worker, parent=os.getpid()),
        )
        if self._num_workers:
            try:
                iter(self._loader)  # starts the workers; there are no specs yet
            except OSError as error:  # no semaphore for their queues
                advice = "is there a /dev/shm, and is it full (df -h /dev/shm)?"
                raise UserError(f"loader workers cannot be started: {error.strerror}; {advice}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_workers:  # workers ignore the SIGTERM that torch would send them at exit
            self._loader._iterator._shutdown_workers()

    def batches(self, specs: Iterable[BatchSpec]) -> Iterator[Batch]:
        """Yield the batches of the specs in order. A new call invalidates the iterator of the call before.

        Raises:
            ProcessError: if a worker dies or a file cannot be read.
            BadImageError: if an image cannot be decoded and `if_bad` is "fail".
        """
        self._sampler.specs = specs
        # Asked only after the workers are forked, because it initializes the device.
        pin = "pinned_memory" in capabilities(device_type())
        with translate_worker_errors():
            for result in self._loader:
                # Workers return expected errors: a raised one would include the worker's traceback.
                if isinstance(result, ProcessError):
                    raise result
                yield self._copy(result, pin)

    def _copy(self, filled: Filled, pin: bool) -> Batch:
        view = _slot_view(self._slots, filled.slot, len(filled.labels), filled.spec.image_size)
        images = torch.empty(view.shape, dtype=torch.uint8, pin_memory=pin)
        np.copyto(images.numpy(), view.numpy())  # by one thread; torch's copy would compete with the computing threads
        labels, indices = (torch.from_numpy(array) for array in (filled.labels, filled.indices))
        if pin:
            labels, indices = labels.pin_memory(), indices.pin_memory()
        return Batch(images.permute(0, 3, 1, 2), labels, indices, filled.spec.step, filled.bad_images)


class SlotWriter(Dataset):
    """The work of a loader worker: read, decode and crop the images of a batch into a slot of shared memory."""

    def __init__(self, source: Source, crop: Crop, slots: torch.Tensor, if_bad: IfBad):
        self._source, self._crop, self._slots, self._if_bad = source, crop, slots, if_bad

    def __getitems__(self, job: tuple[int, BatchSpec]) -> Filled | ProcessError:
        # A DataLoader calls this with what its batch sampler yields: usually indices, here a slot and a spec.
        slot, spec = job
        samples = spec.samples
        images = _slot_view(self._slots, slot, len(samples), spec.image_size).permute(0, 3, 1, 2)
        indices = np.empty(len(samples), dtype=np.int64)
        bad_images: dict[int, str] = {}
        try:
            for group in self._decode(samples, images, indices, bad_images):
                # A replacement takes the draws of the image it replaces; it may occur elsewhere in this batch, too.
                rows = list(group)
                crops = self._crop(list(group.values()), [samples[row] for row in rows], spec.image_size)
                for row, square in zip(rows, crops, strict=True):
                    images[row].copy_(square)
        except ProcessError as error:
            return error
        return Filled(slot, spec, self._source.labels[indices], indices, bad_images)

    def _decode(
        self, samples: list[Sample], images: torch.Tensor, indices: np.ndarray, bad_images: dict[int, str]
    ) -> Iterator[dict[int, torch.Tensor]]:
        """Yield decoded images in groups, by row of the batch. Blank images are written directly."""
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


def _identity(result: Any) -> Any:
    return result


def _slot_view(slots: torch.Tensor, slot: int, num_images: int, image_size: int) -> torch.Tensor:
    """(B, S, S, 3): the layout of decoded images and of the network's input."""
    return slots[slot, : num_images * image_size**2 * 3].view(num_images, image_size, image_size, 3)


def _num_slots(num_workers: int) -> int:
    # One more, because the DataLoader requests the next batch before it returns the current one.
    return PREFETCH_FACTOR * num_workers + 1


def shared_bytes_needed(num_workers: int, batch_size: int, image_size: int) -> int:
    """Bytes of memory that a loader shares with its workers."""
    return _num_slots(num_workers) * batch_size * 3 * image_size**2


Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Prefetched:
    """A batch on its way to the device."""

    bad_images: dict[int, str]
    take: Callable[[], Tensors]
    """Return the prepared tensors, to be used on the current stream. Call it before the next batch is requested, or
    that batch would be copied first."""


def prefetch_to_device(
    batches: Iterable[Batch], device: torch.device, prepare: Callable[[Batch], Tensors]
) -> Iterator[Prefetched]:
    """Copy each batch to the device and prepare it there.

    Iterating waits for the loader; `Prefetched.take` does work of the device. If the device has streams, copy and
    preparation run on a side stream: the host requests the next batch while the device still computes the step before.
    """
    if "streams" not in capabilities(device.type):
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
    # One stream for training and all evaluations: the caching allocator keeps freed blocks per stream.
    return torch.Stream(device)


def _on_compute_stream(prepared: Tensors, side_stream: torch.Stream) -> Tensors:
    compute_stream = torch.accelerator.current_stream(side_stream.device)
    compute_stream.wait_stream(side_stream)
    for tensor in prepared:
        tensor.record_stream(compute_stream)  # else its memory could be reused while the step still reads it
    return prepared
