"""The processes of one launch: rank, size and exchange of values.

They exchange values through a key-value store (torch's TCPStore), before and alongside their process group. So they can
agree before loader workers are forked, an exchange needs no network interface of its own as a Gloo group does, and no
collective's time-out runs while one process takes long. A process that waits prints what it waits for.
"""

import contextlib
import os
import pickle
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed
from torch.distributed import DistError, PrefixStore, Store, TCPStore

import resnet_in1k
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import ProcessError, UserError
from resnet_in1k.utils.format import duration, first_line

T = TypeVar("T")

SAVED_IS_INTACT = "; what was saved before is intact: fix that and resume with --resume"
MAX_POLL_SECONDS = 0.25
"""Longest interval between two polls of the store by a waiting process."""
FAILURE_POLL_SECONDS = 2.0
"""Interval between two checks for a failure of another process, or of the launcher."""
REPORT_SECONDS = 60.0
"""First report of a waiting process; the interval then doubles."""
CONNECT_SECONDS = 1800.0
"""Time-out of connecting: the machines of one job may start many minutes apart."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""NCCL's default of 10 minutes would end a run when one worker's network storage hangs for that long."""
PART_BYTES = 4 << 20
"""The store refuses values of more than 8 MB; the paths of ImageNet's images are 59 MB, 16 MB compressed."""
LEAVE_SECONDS = 5.0
"""Process 0 may serve the store: at its end it waits this long for the others to read from it."""


def world_size() -> int:
    """Number of processes of this launch on all machines, as the launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def launcher_has_ended() -> bool:
    """True if the launcher that started this process was killed: it forwards no signals any more."""
    # `accelerate launch` sets the first variable, torchrun the second.
    launched = {"ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    return bool(launched) and os.getppid() != resnet_in1k.PARENT_PROCESS_ID


class Launch:
    """This process among the processes of its launch. All must make the same calls in the same order.

    Use it as a context: a process that fails in the body ends the waiting of the others.
    """

    def __init__(self, store: Store | None = None, rank: int = 0, world_size: int = 1):
        """Without a store the process is alone."""
        self.rank, self.world_size = rank, world_size
        self.machine = socket.gethostname()
        self._group_store = store
        self._num_calls = self._num_polls = 0
        if store is not None:
            self._store = PrefixStore("launch", store)

    @classmethod
    def connect(cls) -> "Launch":
        """Join the other processes at MASTER_ADDR:MASTER_PORT. Raises UserError if process 0 cannot be reached."""
        if world_size() == 1:
            return cls()
        with _exit_with_launcher():
            return cls(_connect_store(), rank(), world_size())

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def start_process_group(self, backend: str) -> None:
        """Start torch's process group, once, if there are several processes."""
        if self._group_store is not None and not torch.distributed.is_initialized():
            with _exit_with_launcher():
                torch.distributed.init_process_group(
                    backend,
                    store=PrefixStore("group", self._group_store),
                    rank=self.rank,
                    world_size=self.world_size,
                    timeout=COLLECTIVE_TIMEOUT,
                )

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, exc_type: object, error: BaseException | None, traceback: object) -> None:
        if self._group_store is None:
            return
        with contextlib.suppress(DistError):  # the store has ended with its process: nobody is left to inform
            if isinstance(error, Exception):
                self._store.set("failed", f"process {self.rank} on {self.machine}: {first_line(error)}")
            left = self._store.add("left", 1)
            deadline = time.monotonic() + LEAVE_SECONDS
            while self.is_main_process and left < self.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                left = self._store.add("left", 0)

    def broadcast_from_main(self, make: Callable[[], T], doing: str) -> T:
        """Call `make` on the main process and return its value on all processes, where it arrives as a pickle.

        Args:
            doing: what the main process does meanwhile, such as "listing images".

        Raises:
            UserError: on all processes, if `make` raises it.
        """
        if self._group_store is None:
            return make()
        self._num_calls += 1
        key = str(self._num_calls)
        if self.is_main_process:
            try:
                outcome: tuple[str, Any] = ("", make())
            except UserError as error:
                outcome = (str(error), None)
            self._put(key, outcome)
        else:
            outcome = self._take(key, f"process 0 ({doing})")
        problem, value = outcome
        if problem:
            raise UserError(problem)
        return value

    def on_main_process(self, write: Callable[[], None], doing: str, advice: str = SAVED_IS_INTACT) -> None:
        """Run `write`, work on files, on the main process while the others wait. A transient error is retried once.

        Raises:
            UserError: on all processes, with `advice` at its end, if writing fails.
        """

        def guarded() -> None:
            try:
                with files.user_errors():
                    files.retry_once(write)
            except UserError as error:
                raise UserError(f"{error}{advice}") from None

        self.broadcast_from_main(guarded, doing)

    def gather(self, value: T, doing: str) -> list[T]:
        """Return the values of all processes, by rank; each arrives as a pickle."""
        if self._group_store is None:
            return [value]
        self._num_calls += 1
        keys = [f"{self._num_calls}/{rank}" for rank in range(self.world_size)]
        self._put(keys[self.rank], value)
        return [self._take(key, f"process {rank} ({doing})") for rank, key in enumerate(keys)]

    def wait_for_everyone(self, doing: str) -> None:
        """Wait until all processes have made this call."""
        self.gather(None, doing)

    def stop_requested(self, signal_number: int) -> int:
        """Return the number of a signal to stop that any process has received, 0 for none; the same on all processes.

        The main process decides. At its poll n it writes `stop`, n and the signal, if there is one, and then `polls`,
        n. Each other process waits until `polls` has reached its own number of polls, then reads `stop`: so all stop at
        the same poll.
        """
        if self._group_store is None:
            return signal_number
        self._num_polls += 1
        if self.is_main_process:
            if not signal_number and self._store.check(["signal"]):
                signal_number = int(self._store.get("signal"))
            if signal_number:
                self._store.set("stop", f"{self._num_polls} {signal_number}")
            self._store.set("polls", str(self._num_polls))
            return signal_number
        if signal_number:
            self._store.set("signal", str(signal_number))

        def main_has_polled() -> bool:
            return self._store.check(["polls"]) and int(self._store.get("polls")) >= self._num_polls

        self._wait(main_has_polled, "process 0 (exchanging signals)")
        if self._store.check(["stop"]):
            poll, signal_number = map(int, self._store.get("stop").split())
            return signal_number if poll == self._num_polls else 0
        return 0

    def _put(self, key: str, value: Any) -> None:
        data = zlib.compress(pickle.dumps(value), level=1)
        num_parts = -(-len(data) // PART_BYTES)
        for number in range(num_parts):
            self._store.set(f"{key}/part/{number}", data[number * PART_BYTES : (number + 1) * PART_BYTES])
        self._store.set(key, str(num_parts))  # last, when all parts are there

    def _take(self, key: str, waits_for: str) -> Any:
        self._wait(lambda: self._store.check([key]), waits_for)
        num_parts = int(self._store.get(key))
        parts = [self._store.get(f"{key}/part/{number}") for number in range(num_parts)]
        return pickle.loads(zlib.decompress(b"".join(parts)))

    def _wait(self, is_ready: Callable[[], bool], waits_for: str) -> None:
        # Polling, because torch's blocking `get` prints a warning at each time-out and blocks signal handlers.
        start_seconds = failure_seconds = time.monotonic()
        poll_seconds, report_seconds = 0.0005, REPORT_SECONDS
        while not is_ready():
            time.sleep(poll_seconds)
            poll_seconds = min(2 * poll_seconds, MAX_POLL_SECONDS)
            now_seconds = time.monotonic()
            if now_seconds - failure_seconds > FAILURE_POLL_SECONDS:
                failure_seconds = now_seconds
                # The process that failed may have given its value before: then continue.
                if self._store.check(["failed"]) and not is_ready():
                    raise ProcessError(f"stopped because {self._store.get('failed').decode()}")
                if launcher_has_ended():
                    raise ProcessError(f"stopped while waiting for {waits_for}: the launcher has ended")
            if now_seconds - start_seconds > report_seconds:
                report_seconds *= 2
                waited = duration(now_seconds - start_seconds)
                print(f"process {self.rank} on {self.machine}: waiting for {waits_for}, {waited}", file=sys.stderr)


@contextlib.contextmanager
def _exit_with_launcher() -> Iterator[None]:
    """End this process if the launcher ends while the body blocks the main thread in C++ for minutes."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(FAILURE_POLL_SECONDS):
            if launcher_has_ended():
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _connect_store() -> Store:
    """Connect to the store that the launcher serves or, if it serves none, process 0."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            f"{world_size()} processes were launched without MASTER_ADDR and MASTER_PORT, where they would meet; start "
            "them with accelerate launch or torchrun"
        ) from None
    this = f"process {rank()} on {socket.gethostname()}"
    serves = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            timeout = timedelta(seconds=REPORT_SECONDS)
            store = TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timeout)
            # An elastic restart, possibly with fewer processes, must not find the keys of the attempt before it.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return PrefixStore(f"attempt {attempt} of {world_size()}", store)
        except (DistError, ValueError) as error:
            if rank() == 0 or time.monotonic() > deadline or isinstance(error, ValueError):
                problem = "open the store" if serves else "reach process 0"
                raise UserError(
                    f"{this} cannot {problem} at {host}:{port} ({first_line(error)}); check the address, the port, "
                    "which another program may use, and the firewall"
                ) from None
            print(f"{this}: waiting for process 0 at {host}:{port}", file=sys.stderr)
