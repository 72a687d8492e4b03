"""Worker processes: how they start and end, and a pool of them."""

import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.signals import SIGNALS

T = TypeVar("T")
R = TypeVar("R")


def worker_context() -> str | None:
    """Return the start method of workers; None for Python's default."""
    # fork shares the source's arrays with the workers and starts them at once; Python 3.14 no longer chooses it.
    # macOS has it, but its system libraries are not safe after it.
    return "fork" if sys.platform == "linux" else None


def init_worker(worker_id: int, parent: int) -> None:
    """Prepare a loader worker; `parent` is the id of the process that started it."""
    end_with_parent(parent)
    torch.set_num_threads(1)  # the workers are the parallelism
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the main process decides when to stop, and then ends its workers
    gc.freeze()  # collecting inherited objects would write to, and so copy, the pages shared with the main process


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent, however the parent ends."""

    def watch() -> None:
        # torch's own check compares with the parent at the worker's start. If that one has been killed by then, the
        # worker would never end, and would keep the memory and the open pipes of the run.
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shared_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    """Allocate uint8 memory that workers started later share with this process."""
    if worker_context() == "fork":  # inherited, and not limited by the size of /dev/shm
        return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)
    return torch.empty(shape, dtype=torch.uint8).share_memory_()


def check_semaphores() -> None:
    """Raise UserError if processes cannot have queues: each needs a semaphore in /dev/shm."""
    try:
        multiprocessing.get_context(worker_context()).Semaphore()
    except OSError as error:
        raise UserError(
            f"processes cannot be started: {error.strerror}; make room in /dev/shm (df -h /dev/shm), or do without "
            "them: --workers 0, for prepare_data.py --processes 1"
        ) from None


def run_parallel(work: Callable[[T], R], jobs: Sequence[T], num_processes: int) -> Iterator[R]:
    """Yield the results in the order of the jobs. With one process or job, everything happens in this process.

    `work` is pickled once for each process, when it starts. Raises UserError if `work` does, or a process is killed.
    """
    if num_processes == 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    check_semaphores()
    context = multiprocessing.get_context(worker_context())
    pool = ProcessPoolExecutor(num_processes, context, initializer=_init_pool, initargs=(work, os.getpid()))
    try:
        yield from pool.map(_do, jobs)
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, by a signal or for lack of memory (free -g); run the same command to continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]


def _do(job: Any) -> Any:
    return _work(job)


def _init_pool(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    end_with_parent(parent)
    torch.set_num_threads(1)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes and ends each at once
