"""From a source to uint8 batches on the device: order, decoding, cropping, workers, copying.

Workers do only what must happen per file: decode and crop. What can be done for a whole batch at once is done on the
device, by `augment`. No float tensor crosses a process border.
"""

import atexit
import contextlib
import functools
import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from resnet_in1k import files, randomness
from resnet_in1k.errors import BadImageError, ProcessError
from resnet_in1k.images import EvalTransform, TrainTransform, decode
from resnet_in1k.randomness import Stream
from resnet_in1k.recipes import Recipe
from resnet_in1k.sources import Source


@dataclass(frozen=True)
class Batch:
    """`images` (B, 3, S, S) uint8, `labels` (B,) int64, `indices` (B,) int64: the images' places in their source."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    bad_images: dict[int, str] = field(default_factory=dict)
    """The images met on the way that cannot be read, by their places in the source, with the decoder's reasons."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Batch":
        tensors = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels, self.indices))
        return Batch(*tensors, self.bad_images)


def epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of an epoch, (N,) int64, a permutation that depends on (seed, epoch) alone."""
    return torch.randperm(num_images, generator=randomness.generator(seed, Stream.ORDER, epoch))


class TrainOrder:
    """For each step of the run from `first_step` to `last_step`, the samples of this process, as (epoch, index).

    Global batch k of an epoch is the k-th slice of its order; process r takes the r-th slice of the global batch. The
    images left over at an epoch's end, fewer than a global batch, get their turn in the next epoch's order.
    """

    def __init__(
        self,
        *,
        num_images: int,
        global_batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        assert global_batch_size % world_size == 0, "checked by the plan"
        self._num_images, self._seed = num_images, seed
        self._global_batch_size, self._per_process = global_batch_size, global_batch_size // world_size
        self._steps, self._rank = range(first_step, last_step + 1), rank

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self._num_images // self._global_batch_size
        order, order_epoch = torch.empty(0), 0
        for step in self._steps:
            epoch, step_in_epoch = (step - 1) // steps_per_epoch + 1, (step - 1) % steps_per_epoch
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self._num_images, self._seed, epoch), epoch
            start = step_in_epoch * self._global_batch_size + self._rank * self._per_process
            yield [(epoch, index) for index in order[start : start + self._per_process].tolist()]


class EvalOrder:
    """The samples of this process, each image of the split on exactly one process, without padding."""

    def __init__(self, *, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self._mine, self._batch_size = range(rank, num_images, world_size), batch_size

    def __len__(self) -> int:
        return -(-len(self._mine) // self._batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self._mine), self._batch_size):
            yield [(0, index) for index in self._mine[start : start + self._batch_size]]


PREFETCH_FACTOR = 4
"""Batches under way per worker."""
Job = tuple[int, list[tuple[int, int]]]
"""A slot of shared memory, and the (epoch, index) of the samples that belong into it."""
Filled = tuple[int, np.ndarray, np.ndarray, dict[int, str]]
"""A slot, the labels and indices of the samples that are in it, and the bad images met, with reasons."""
OnBadImage = Literal["fail", "skip"]
"""What training does about an image that cannot be read."""
IfBad = Literal["fail", "replace", "blank", "blank_even_without_disk"]
"""`replace`: by the next image of the source that can be decoded; `blank`: by zeros, to be counted as wrong. All stop
at a file that cannot be read from its disk, but for the last, which is for predictions of whatever there is."""
Transform = Callable[[torch.Tensor, int, int], torch.Tensor]


class Samples(Dataset):
    """What a worker does: read, decode and transform the samples of a batch, straight into a slot of shared memory.

    An image that is to stop the run comes back as an error *value*: raised in a worker it would reach the user wrapped
    in the worker's traceback.
    """

    def __init__(self, source: Source, transform: Transform, slots: torch.Tensor, if_bad: IfBad):
        self._source, self._transform, self._slots, self._if_bad = source, transform, slots, if_bad

    def __getitems__(self, job: Job) -> Filled | ProcessError:
        slot, samples = job
        indices = np.empty(len(samples), dtype=np.int64)
        bad: dict[int, str] = {}
        for row, (epoch, index) in enumerate(samples):
            try:
                place, image = self._first_good(index, bad)
            except ProcessError as error:
                return error
            indices[row] = place
            if image is None:
                self._slots[slot, row].zero_()
            else:
                # Drawn for the sample, not for what replaces it, which may be in this batch by itself.
                self._slots[slot, row].copy_(self._transform(image, epoch, index))
        return slot, self._source.labels[indices], indices, bad

    def _first_good(self, index: int, bad: dict[int, str]) -> tuple[int, torch.Tensor | None]:
        """The image at `index` or, to replace it, the next that can be read, with its place; None to be blank.

        It depends on the files alone, so that every epoch, process and resumed run sees the same.
        """
        at_most = most_bad_images(len(self._source)) if self._if_bad == "replace" else 0
        for place in range(index, index + at_most + 1):
            place %= len(self._source)
            try:
                return place, decode(files.twice_if_need_be(functools.partial(self._source.read, place)))
            except OSError as error:  # about the disk, not the image: in a moment or an epoch it may be otherwise
                if self._if_bad == "blank_even_without_disk":
                    bad[place] = error.strerror or str(error)
                    return index, None
                name = self._source.image_name(place)
                raise ProcessError(f"{name} cannot be read from its disk: {error.strerror or error}") from None
            except ValueError as error:
                bad[place] = str(error)
        if self._if_bad.startswith("blank"):
            return index, None
        if self._if_bad == "replace":
            raise ProcessError(too_many_bad_images(bad, self._source))
        raise BadImageError.about(self._source.image_name(index), bad[index])


def most_bad_images(num_images: int) -> int:
    """How many images of so many may be replaced: 0.1 %."""
    return num_images // 1000


def too_many_bad_images(bad_images: Collection[int], source: Source) -> str:
    first = source.image_name(min(bad_images))
    return (
        f"{len(bad_images)} of {len(source):,} training images cannot be read ({first}, …), more than the 0.1 % that "
        "--on-bad-image skip replaces; repair or remove them"
    )


class Loader:
    """Batches in host memory, decoded ahead by `num_workers` processes (0: in this process, for debugging).

    The workers write into a ring of slots that is shared with them once, at the start. Fresh shared memory for each
    batch, as a plain DataLoader takes it, costs a page fault every 4 KiB: a tenth of a worker's time, measured. Each
    batch is copied out of its slot, so it is the caller's to keep.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        order: Collection[list[tuple[int, int]]],
        *,
        batch_size: int,
        image_size: int,
        num_workers: int,
        pin_memory: bool,
        if_bad: IfBad = "fail",
    ):
        self._source, self._transform, self._order, self._if_bad = source, transform, order, if_bad
        self._batch_shape = (batch_size, 3, image_size, image_size)
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        """Raises ProcessError (BadImageError for a file no decoder could read), also for the death of a worker."""
        num_slots = _num_slots(self._num_workers)
        slots = _shared_bytes((num_slots, *self._batch_shape))
        begun = _shared_bytes((max(1, self._num_workers),))
        loader = DataLoader(
            Samples(self._source, self._transform, slots, self._if_bad),
            batch_sampler=_Jobs(self._order, num_slots),  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
            prefetch_factor=PREFETCH_FACTOR if self._num_workers else None,
            multiprocessing_context=worker_context() if self._num_workers else None,
            worker_init_fn=functools.partial(_be_a_modest_worker, parent=os.getpid(), begun=begun),
        )
        with _workers_at_work(loader, begun) as results, worker_deaths_explained():
            for result in results:
                if isinstance(result, ProcessError):
                    raise result
                slot, labels, indices, bad_images = result
                shape = (len(labels), *self._batch_shape[1:])
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
                # By NumPy, in this thread alone: the others are computing.
                np.copyto(images.numpy(), slots[slot, : len(labels)].numpy())
                small = [torch.from_numpy(array) for array in (labels, indices)]
                small = [tensor.pin_memory() if self._pin_memory else tensor for tensor in small]
                yield Batch(images, *small, bad_images)


@contextlib.contextmanager
def _workers_at_work(loader: DataLoader, begun: torch.Tensor) -> Iterator[Iterator[Any]]:
    """The loader's results, from workers that end with the body, or with the program if that is never left.

    They ignore SIGTERM, by which torch would end them at the program's end, and then wait for them for ever.
    """
    results = _started(loader, begun)
    shut_down = getattr(results, "_shutdown_workers", lambda: None)  # there are none with num_workers=0
    atexit.register(shut_down)
    try:
        yield results
    finally:
        atexit.unregister(shut_down)
        shut_down()


@contextlib.contextmanager
def worker_deaths_explained() -> Iterator[None]:
    """Raises ProcessError for a loader worker's death, which torch reports wherever the main process happens to be."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise ProcessError(
            f"a loader worker died ({reason}); if memory or /dev/shm is short (free -g, df -h /dev/shm), "
            "use fewer --workers"
        ) from error


STARTS = 3
START_SECONDS = 60.0
"""For all workers to be heard of; a hundredth is plenty where they are forked, but others may have to import torch."""


def _started(loader: DataLoader, begun: torch.Tensor) -> Iterator[Any]:
    """Start the workers, and again if one of them hangs in its birth, as a fork among threads can.

    The child has a copy of every lock that another thread held just then, and may wait for it for ever. So does CPython
    itself before late releases of 3.11 (https://github.com/python/cpython/issues/112275), for the lock of its list of
    threads, which Gloo's threads take to let go of a tensor, at a time of their own.
    """
    for _ in range(STARTS):
        time.sleep(0.01)  # without Python's big lock, so that such threads can come to their end
        begun.zero_()
        others = multiprocessing.active_children()
        results = iter(loader)
        deadline_seconds = time.monotonic() + START_SECONDS
        while not begun[: loader.num_workers].all():
            if time.monotonic() > deadline_seconds:
                break
            time.sleep(0.001)
        else:
            return results
        ours = set(multiprocessing.active_children()).difference(others)
        while any(worker.is_alive() for worker in ours):
            with contextlib.suppress(RuntimeError):  # by which torch tells of a worker's death, wherever we are then
                for worker in ours:
                    worker.kill()
                for worker in ours:
                    worker.join()
        with contextlib.suppress(RuntimeError):
            results._shutdown_workers()  # type: ignore[attr-defined]
    raise ProcessError(
        f"{loader.num_workers} loader workers have not begun within {START_SECONDS:.0f} s, {STARTS} times; take fewer "
        "--workers, or look at what else this machine is doing"
    )


class _Jobs:
    """The batches of an order with the slots they go to, in turn."""

    def __init__(self, order: Collection[list[tuple[int, int]]], num_slots: int):
        self._order, self._num_slots = order, num_slots

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Job]:
        for number, samples in enumerate(self._order):
            yield number % self._num_slots, samples


def _as_it_is(result: Any) -> Any:
    return result


def _num_slots(num_workers: int) -> int:
    # The DataLoader asks for one more batch before it hands one over: that one must not go where this one lies.
    return PREFETCH_FACTOR * num_workers + 1


def shared_bytes_needed(num_workers: int, batch_size: int, image_size: int) -> int:
    """Memory that a loader shares with its workers."""
    return _num_slots(num_workers) * batch_size * 3 * image_size**2


def _shared_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 memory that workers started after this call share with this process."""
    if worker_context() == "fork":  # inherited, and not limited by the size of /dev/shm
        return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)
    return torch.empty(shape, dtype=torch.uint8).share_memory_()


def worker_context() -> str | None:
    """How workers are started; None for Python's own way."""
    # fork shares the source's arrays with the workers and starts them at once; Python 3.14 no longer chooses it.
    # On macOS it is to be had, but not safe.
    return "fork" if sys.platform == "linux" else None


PARENT_CHECKED_EVERY_SECONDS = 2.0


def _be_a_modest_worker(worker_id: int, parent: int, begun: torch.Tensor) -> None:
    begun[worker_id] = 1
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)  # the workers are the parallelism
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the main process decides when to stop, and then needs them no more
    gc.freeze()  # collecting what was inherited would touch, and so copy, the pages shared with the main process


def _end_with(parent: int) -> None:
    """End this worker once its parent has ended.

    torch's own watchdog asks a worker's first moments who the parent is: of one killed by then it never hears, and the
    worker stays for ever, with the memory and the open pipes of the run.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECKED_EVERY_SECONDS)
    os._exit(1)


def train_loader(
    source: Source,
    recipe: Recipe,
    *,
    first_step: int,
    last_step: int,
    num_workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
    on_bad_image: OnBadImage = "fail",
) -> Loader:
    """One loader for all steps of a run: epochs' ends do not interrupt the workers."""
    return Loader(
        source,
        TrainTransform(image_size=recipe.image_size, crop_scale_min=recipe.crop_scale_min, seed=recipe.seed),
        TrainOrder(
            num_images=len(source),
            global_batch_size=recipe.global_batch_size,
            seed=recipe.seed,
            first_step=first_step,
            last_step=last_step,
            rank=rank,
            world_size=world_size,
        ),
        batch_size=recipe.global_batch_size // world_size,
        image_size=recipe.image_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        if_bad="replace" if on_bad_image == "skip" else "fail",
    )


def eval_loader(
    source: Source,
    *,
    image_size: int,
    resize_size: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
    if_bad: IfBad = "blank",
) -> Loader:
    """Each image of the split once; one that cannot be decoded is blank, and said to be bad."""
    return Loader(
        source,
        EvalTransform(image_size=image_size, resize_size=resize_size),
        EvalOrder(num_images=len(source), batch_size=batch_size, rank=rank, world_size=world_size),
        batch_size=batch_size,
        image_size=image_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        if_bad=if_bad,
    )


Take = Callable[[], tuple[torch.Tensor, ...]]
"""Gives one batch's prepared tensors to the current stream; to be called before the next batch is asked for."""


def on_device(
    batches: Iterable[Batch], device: torch.device, prepare: Callable[[Batch], tuple[torch.Tensor, ...]]
) -> Iterator[Take]:
    """Copies each batch to the device and prepares it there.

    Waiting for the next item is waiting for the loader; all that its call costs is work of the device.

    On CUDA both happen on a side stream. As the host runs ahead of the device, it asks for the next batch while the
    device still computes the step before: copy and augmentation run beside that step, not after it.
    """
    if device.type != "cuda":
        for batch in batches:
            yield functools.partial(prepare, batch.to(device))
        return

    side_stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(side_stream):
            prepared = prepare(batch.to(device))
        yield functools.partial(_hand_over, prepared, side_stream)


def _hand_over(prepared: tuple[torch.Tensor, ...], side_stream: torch.cuda.Stream) -> tuple[torch.Tensor, ...]:
    compute_stream = torch.cuda.current_stream(side_stream.device)
    compute_stream.wait_stream(side_stream)
    for tensor in prepared:
        tensor.record_stream(compute_stream)  # else its memory could be reused while the step still reads it
    return prepared
