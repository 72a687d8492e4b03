"""Loader worker processes: how they start, what they ignore, how they end, and how their death is explained."""

import contextlib
import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch

from resnet_in1k.utils.errors import ProcessError, UserError
from resnet_in1k.utils.signals import SIGNALS

PARENT_CHECKED_EVERY_SECONDS = 2.0


def worker_context() -> str | None:
    """How workers are started; None for Python's default."""
    # fork shares the source's arrays with the workers and starts them at once; Python 3.14 no longer chooses it.
    # macOS has it, but its system libraries are not safe after it.
    return "fork" if sys.platform == "linux" else None


def init_worker(worker_id: int, parent: int) -> None:
    """What each worker does first; `parent` is the process id of the one that started it."""
    end_with_parent(parent)
    torch.set_num_threads(1)  # the workers are the parallelism
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the main process decides when to stop, and ends its workers then
    gc.freeze()  # collecting inherited objects would write to, and so copy, the pages shared with the main process


def end_with_parent(parent: int) -> None:
    """End this process soon after that one, however it ends."""
    threading.Thread(target=_exit_after_parent, args=(parent,), daemon=True).start()


def _exit_after_parent(parent: int) -> None:
    # torch's own check compares with the parent that the worker finds when it starts: if that has been killed by then,
    # the worker would never end, and keep the memory and the open pipes of the run.
    while os.getppid() == parent:
        time.sleep(PARENT_CHECKED_EVERY_SECONDS)
    os._exit(1)


def check_workers_can_start() -> None:
    """Raises UserError if this machine has no semaphores for worker queues."""
    try:
        multiprocessing.get_context(worker_context()).Lock()
    except OSError as error:
        raise UserError(
            f"loader workers cannot be started: no semaphore available ({error.strerror}); is there a /dev/shm, and "
            "is it full (df -h /dev/shm)?"
        ) from None


@contextlib.contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Raises ProcessError for a loader worker's death, which torch raises wherever the main process happens to be."""
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


def shared_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 memory that workers started after this call share with this process."""
    if worker_context() == "fork":  # inherited, and not limited by the size of /dev/shm
        return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)
    return torch.empty(shape, dtype=torch.uint8).share_memory_()
