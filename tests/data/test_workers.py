"""Loader workers as processes: signals, death, and the end of their parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from helpers.processes import ROOT

from resnet_in1k.data.crop import Crop
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.loader import Loader
from resnet_in1k.data.sampler import BatchSpec, Sample
from resnet_in1k.utils import pool as workers
from resnet_in1k.utils.errors import ProcessError


def spec_of(step: int, num_images: int) -> BatchSpec:
    """The first image of the source, several times, at 8 px."""
    return BatchSpec(step, 8, 1, np.zeros(num_images, dtype=np.int64), np.zeros(num_images, dtype=np.int64))


class Killed(Crop):
    """Ends its worker as the kernel does when memory runs out."""

    def many(self, images: Sequence[torch.Tensor], samples: Sequence[Sample], size: int) -> Iterator[torch.Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield from images


def test_the_death_of_a_worker_is_explained_with_what_to_do(source: Source):
    message = r"a loader worker died .*/dev/shm.*fewer --workers"
    with (
        Loader(source, Killed(), batch_size=1, largest_image_size=8, num_workers=1) as loader,
        pytest.raises(ProcessError, match=message),
    ):
        list(loader.batches([spec_of(1, num_images=1)]))


def test_other_errors_are_not_taken_for_the_death_of_a_worker():
    with pytest.raises(RuntimeError, match="shapes differ") as error, workers.translate_worker_errors():
        raise RuntimeError("shapes differ")
    assert error.type is RuntimeError


class NumThreadsAsImage(Crop):
    def many(self, images: Sequence[torch.Tensor], samples: Sequence[Sample], size: int) -> Iterator[torch.Tensor]:
        return (torch.full((3, size, size), torch.get_num_threads(), dtype=torch.uint8) for _ in images)


def test_workers_compute_with_one_thread_and_leave_signals_to_the_main_process(source: Source):
    with Loader(source, NumThreadsAsImage(), batch_size=4, largest_image_size=8, num_workers=1) as loader:
        (worker,) = multiprocessing.active_children()
        for number, batch in enumerate(loader.batches([spec_of(step, num_images=4) for step in range(30)])):
            if number == 1:  # the first has shown that the worker has started
                for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                    os.kill(worker.pid, sent)
                time.sleep(0.05)
            assert batch.images.unique().tolist() == [1]
        assert number == 29
        assert worker.is_alive()


@pytest.mark.slow
def test_a_worker_ends_whose_parent_is_killed_while_it_starts():
    """It finds another parent when it first looks, and gets no work: all it can tell by is its parent's number."""
    code = """
import os, time
from resnet_in1k.data import loader
from resnet_in1k.data.registry import open_source
from resnet_in1k.evaluate.evaluation import EvalPreprocessing, eval_loader
original = loader.init_worker
def late(*arguments, **named):
    print("started", flush=True)
    while os.getppid() == named["parent"]:
        time.sleep(0.01)
    original(*arguments, **named)
loader.init_worker = late
with eval_loader(open_source("digits", "val"), EvalPreprocessing(8, 8), 1, 1):
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "started\n"
    process.kill()
    process.communicate(timeout=20)  # to the end of what the worker, too, holds open
