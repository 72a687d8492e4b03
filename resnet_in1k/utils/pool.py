"""Work in several processes, with its progress."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import duration
from resnet_in1k.utils.workers import end_with_parent, worker_context

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 4
"""Jobs submitted for each process: so few that an error stops the work soon, and little waits in memory."""
PRINTED_EVERY_SECONDS = 10.0


class Progress:
    """How far the work is, its rate and the time left: a line from time to time, and at the end."""

    def __init__(
        self,
        print_line: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
        only_if_long: bool = False,
    ):
        """`only_if_long`: nothing at the end of what took less than the time between two lines."""
        self._print, self._only_if_long = print_line, only_if_long

    def start(self, total: int, what: str, unit: str = "images") -> None:
        self._total, self._done, self._what, self._unit = total, 0, what, unit
        self._started_at = self._printed_at = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._printed_at >= PRINTED_EVERY_SECONDS:
            self._printed_at = time.monotonic()
            rate = self._done / (self._printed_at - self._started_at)
            left = duration(max(0, self._total - self._done) / rate) if rate else "?"
            self._print(f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, {left} left")

    def tell(self, line: str) -> None:
        """Something that happened on the way."""
        self._print(line)

    def finish(self) -> None:
        took = max(time.monotonic() - self._started_at, 1e-6)
        if self._done and not (self._only_if_long and took < PRINTED_EVERY_SECONDS):
            self._print(f"{self._what}: {self._done:,} {self._unit} in {duration(took)}, {self._done / took:,.0f}/s")


def run_parallel(work: Callable[[T], R], jobs: Sequence[T], processes: int) -> Iterator[R]:
    """The results, as they come; in this process if `processes` is 1. Each process gets `work` once, when it starts.

    Raises:
        UserError: if `work` raises it, or a process is killed.
    """
    if processes == 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    context = get_context(worker_context())
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_init, initargs=(work, os.getpid())) as pool:
        waiting, left = set[Future[R]](), iter(jobs)
        try:
            while True:
                for job in left:
                    waiting.add(pool.submit(_do, job))
                    if len(waiting) >= AHEAD * processes:
                        break
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process was killed, by a signal or for want of memory (free -g); run the same command again to go on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]


def _do(job: Any) -> Any:
    return _work(job)


def _init(work: Callable[[Any], Any], parent: int) -> None:
    import torch

    global _work
    _work = work
    end_with_parent(parent)
    torch.set_num_threads(1)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, which all get, ends it at once: nothing is lost by a kill
