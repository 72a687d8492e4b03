"""Load batches in worker processes and copy them to the device.

Workers do only what must happen for each file: decode and crop. Everything that works on a complete batch happens on
the device, in `augment`. Only uint8 pixels pass between processes.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from resnet_in1k.data.crop import Crop
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import IfBad, read_image
from resnet_in1k.data.sampler import BatchSpec
from resnet_in1k.utils.device import capabilities, device_type
from resnet_in1k.utils.errors import ProcessError
from resnet_in1k.utils.pool import check_semaphores, init_worker, shared_bytes, worker_context

NUMBER_BYTES = 16
"""Bytes of an image's label and index, int64 each."""
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
    packed: torch.Tensor | None = None
    """The allocation of all three tensors, (16 B + 3 B S S,) uint8; only with it a batch can be copied to a device."""

    @classmethod
    def pack(
        cls, images: torch.Tensor, labels: np.ndarray, indices: Sequence[int], step: int, bad_images: dict[int, str]
    ) -> "Batch":
        """Copy images, (B, S, S, 3) uint8, and their numbers into one allocation, in pinned memory if there is any."""
        # Asked only after the workers are forked, because it initializes the device.
        pin = "pinned_memory" in capabilities(device_type())
        packed = torch.empty(NUMBER_BYTES * len(images) + images.numel(), dtype=torch.uint8, pin_memory=pin)
        batch = cls(*_unpacked(packed, images.shape), step, bad_images, packed)
        # By one thread: torch's copy would compete with the computing threads.
        np.copyto(batch.images.permute(0, 2, 3, 1).numpy(), images.numpy())
        batch.labels.numpy()[:], batch.indices.numpy()[:] = labels, indices
        return batch

    def to(self, device: torch.device) -> "Batch":
        """Copy a packed batch to the device in one copy; the host does not wait if it is pinned."""
        if device.type == "cpu":
            return self
        # From memory that is not pinned only a blocking copy is safe.
        packed = self.packed.to(device, non_blocking=self.packed.is_pinned())
        images, *numbers = _unpacked(packed, self.images.permute(0, 2, 3, 1).shape)
        # Clones, because evaluation keeps them: views would keep the images, too.
        return Batch(images, *(each.clone() for each in numbers), self.step, self.bad_images)


def _unpacked(packed: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Return a packed batch's images, labels and indices, as views of its bytes."""
    numbers, pixels = packed.tensor_split([NUMBER_BYTES * shape[0]])
    labels, indices = numbers.view(torch.int64).view(2, -1)  # before the pixels, because they need aligned addresses
    return pixels.view(*shape).permute(0, 3, 1, 2), labels, indices


Job = tuple[int, BatchSpec]
"""The slot to write a batch to, and the batch."""


class _Sampler:
    """The DataLoader's sampler: it has one for its life, and iterates over it again for each call of `batches`."""

    jobs: Iterator[Job] = iter(())

    def __iter__(self) -> Iterator[Job]:
        return self.jobs


class Loader:
    """Make batches of a source; the workers live as long as the body of its `with`.

    Workers write into a ring of slots of shared memory, which is allocated once. A plain DataLoader allocates shared
    memory for each batch and pays a page fault every 4 KiB, a tenth of a worker's time (measured). Each batch is copied
    out of its slot, so the caller may keep it.

    Enter it before the process group exists: in a process forked next to another thread, such as Gloo's, a lock that
    this thread holds is never released (https://github.com/python/cpython/issues/112275).
    """

    def __init__(
        self, source: Source, crop: Crop, *, batch_size: int, largest_image_size: int, num_workers: int, if_bad: IfBad
    ):
        """With `num_workers` 0 everything happens in this process, for debugging."""
        self.batch_size, self._num_workers, self._source, self._sampler = batch_size, num_workers, source, _Sampler()
        # One more than are in preparation: the DataLoader requests the next batch before it returns the current one.
        num_slots = PREFETCH_FACTOR * num_workers + 1
        self.slots = shared_bytes((num_slots, batch_size * 3 * largest_image_size**2))
        workers = {
            "num_workers": num_workers,
            "prefetch_factor": PREFETCH_FACTOR,
            "persistent_workers": True,
            "multiprocessing_context": worker_context(),
            "worker_init_fn": functools.partial(init_worker, parent=os.getpid()),
        }
        writer = SlotWriter(source, crop, self.slots, if_bad)
        self._loader = DataLoader(writer, batch_size=None, sampler=self._sampler, **(workers if num_workers else {}))

    def __enter__(self) -> "Loader":
        if self._num_workers:
            check_semaphores()
            iter(self._loader)  # starts the workers; there are no jobs yet
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_workers:  # workers ignore the SIGTERM that torch would send them at exit
            self._loader._iterator._shutdown_workers()

    def batches(self, specs: Iterable[BatchSpec]) -> Iterator[Batch]:
        """Yield the batches of the specs in order. A new call invalidates the iterator of the call before.

        Raises:
            ProcessError: if a file cannot be read, or an image cannot be decoded and `if_bad` is "fail".
        """
        # The DataLoader takes jobs in advance, and returns their results in the same order.
        jobs, self._sampler.jobs = itertools.tee((n % len(self.slots), spec) for n, spec in enumerate(specs))
        for result, (slot, spec) in zip(self._loader, jobs, strict=True):
            if isinstance(result, ProcessError):
                raise result
            view, (indices, bad_images) = _slot_view(self.slots, slot, spec), result
            yield Batch.pack(view, self._source.labels[indices], indices, spec.step, bad_images)


class SlotWriter(Dataset):
    """The work of a loader worker: read, decode and crop the images of a batch into a slot of shared memory."""

    def __init__(self, source: Source, crop: Crop, slots: torch.Tensor, if_bad: IfBad):
        self._source, self._crop, self._slots, self._if_bad = source, crop, slots, if_bad

    def __getitem__(self, job: Job) -> tuple[list[int], dict[int, str]] | ProcessError:
        """Return the positions of the images in the source, and `Batch.bad_images`.

        The positions are a list: the DataLoader would make a tensor of an array, and allocate shared memory for it.
        """
        try:
            return self._write(*job)
        except ProcessError as error:  # returned: a raised one would include the worker's traceback
            return error

    def _write(self, slot: int, spec: BatchSpec) -> tuple[list[int], dict[int, str]]:
        images = _slot_view(self._slots, slot, spec).permute(0, 3, 1, 2)
        samples, indices, bad_images = spec.samples, list[int](), dict[int, str]()
        group: dict[int, torch.Tensor] = {}  # decoded images by row of the batch
        for row, sample in enumerate(samples):
            index, image = read_image(self._source, sample.index, self._if_bad, bad_images)
            indices.append(index)
            if image is None:
                images[row].zero_()
            else:
                group[row] = image
            is_full = len(group) == GROUP_IMAGES or sum(each.nbytes for each in group.values()) >= GROUP_BYTES
            if is_full or row == len(samples) - 1:
                # A replacement takes the draws of the image it replaces; it may occur elsewhere in this batch, too.
                crops = self._crop(list(group.values()), [samples[place] for place in group], spec.image_size)
                for place, square in zip(group, crops, strict=True):
                    images[place].copy_(square)
                group.clear()
        return indices, bad_images


def _slot_view(slots: torch.Tensor, slot: int, spec: BatchSpec) -> torch.Tensor:
    """(B, S, S, 3): the layout of decoded images and of the network's input."""
    shape = (len(spec.samples), spec.image_size, spec.image_size, 3)
    return slots[slot, : math.prod(shape)].view(shape)


Tensors = tuple[torch.Tensor, ...]
Prefetched = tuple[dict[int, str], Callable[[], Tensors]]
"""`Batch.bad_images`, and a function that returns the prepared tensors, to be used on the current stream. Call it
before the next batch is requested, or that batch would be copied first."""


def prefetch_to_device(
    batches: Iterable[Batch], device: torch.device, prepare: Callable[[Batch], Tensors]
) -> Iterator[Prefetched]:
    """Copy each batch to the device and prepare it there.

    Iterating waits for the loader; the function yielded does work of the device. If the device has streams, copy and
    preparation run on a side stream: the host requests the next batch while the device still computes the step before.
    """
    if "streams" not in capabilities(device.type):
        for batch in batches:
            yield batch.bad_images, functools.partial(prepare, batch.to(device))
        return
    side_stream = _side_stream(device)
    for batch in batches:
        with side_stream:
            prepared = prepare(batch.to(device))
        yield batch.bad_images, functools.partial(_on_compute_stream, prepared, side_stream)


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
