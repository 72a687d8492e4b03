"""Loader workers as processes: signals, death, and the end of their parent."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import pytest
import torch

from resnet_in1k.data import loader
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.loader import Loader
from resnet_in1k.data.sampler import BatchSpec, Sample
from resnet_in1k.utils.errors import ProcessError, UserError, translate_errors
from resnet_in1k.utils.pool import init_worker, worker_context


def spec_of(step: int, num_images: int) -> BatchSpec:
    """The first image of the source, several times, at 8 px."""
    return BatchSpec(step, 8, [Sample(1, 0)] * num_images)


def kill(images: Sequence[torch.Tensor], samples: Sequence[Sample], size: int) -> Iterator[torch.Tensor]:
    """A crop that ends its worker as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield from images


def test_the_death_of_a_worker_is_explained_with_what_to_do(source: Source):
    message = r"a loader worker died .*/dev/shm.*fewer --workers"
    with (
        Loader(source, kill, batch_size=1, largest_image_size=8, num_workers=1, if_bad="fail") as loading,
        pytest.raises(ProcessError, match=message),
        translate_errors(),
    ):
        list(loading.batches([spec_of(1, num_images=1)]))


def test_without_semaphores_workers_are_refused_in_one_line(source: Source, monkeypatch: pytest.MonkeyPatch):
    def no_semaphore(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(type(multiprocessing.get_context(worker_context())), "Semaphore", no_semaphore)
    with (
        pytest.raises(
            UserError, match=r"cannot be started: No space left on device; make room in /dev/shm .* --workers 0"
        ),
        Loader(source, kill, batch_size=1, largest_image_size=8, num_workers=1, if_bad="fail"),
    ):
        pass


def num_threads(images: Sequence[torch.Tensor], samples: Sequence[Sample], size: int) -> Iterator[torch.Tensor]:
    return (torch.full((3, size, size), torch.get_num_threads(), dtype=torch.uint8) for _ in images)


def test_workers_compute_with_one_thread_and_leave_signals_to_the_main_process(source: Source):
    with Loader(source, num_threads, batch_size=4, largest_image_size=8, num_workers=1, if_bad="fail") as loading:
        (worker,) = multiprocessing.active_children()
        for number, batch in enumerate(loading.batches([spec_of(step, num_images=4) for step in range(30)])):
            if number == 1:  # the first has shown that the worker has started
                for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                    os.kill(worker.pid, sent)
                time.sleep(0.05)
            assert batch.images.unique().tolist() == [1]
        assert number == 29
        assert worker.is_alive()


def load_until_killed(source: Source, started: Connection) -> None:
    def init_late(*arguments: int, parent: int) -> None:
        started.send("started")
        while os.getppid() == parent:
            time.sleep(0.01)
        init_worker(*arguments, parent=parent)

    loader.init_worker = init_late
    with Loader(source, num_threads, batch_size=1, largest_image_size=8, num_workers=1, if_bad="fail"):
        time.sleep(60)


def test_a_worker_ends_whose_parent_is_killed_while_it_starts(source: Source):
    """It finds another parent when it first looks, and gets no work: all it can tell by is its parent's number."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=load_until_killed, args=(source, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "started"
    process.kill()
    assert ours.poll(timeout=20)  # the end of what the worker, too, holds open
    process.join()
