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
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore

import resnet_in1k
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import ProcessError, UserError
from resnet_in1k.utils.format import duration, first_line
from resnet_in1k.utils.process import rank, world_size

T = TypeVar("T")

SAVED_IS_INTACT = "; what was saved before is intact: fix that and resume with --resume"
FAILURE_POLL_SECONDS = 2.0
"""Interval between two checks for a failure of another process, or of the launcher."""
FAILURE_SECONDS = 10.0
"""Time that a process has to end in its own way after another one has failed."""
REPORT_SECONDS = 60.0
"""First report of a waiting process; the interval then doubles."""
CONNECT_SECONDS = 1800.0
"""Time-out of connecting and of collectives: the machines of one job may start many minutes apart, and the network
storage of one may hang for longer than NCCL's default of 10 minutes."""


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
        self.rank, self.world_size, self.machine = rank, world_size, socket.gethostname()
        self.store = store or HashStore()
        self._num_calls = self._num_polls = 0
        self._has_left = False

    @classmethod
    def connect(cls) -> "Launch":
        """Join the other processes at MASTER_ADDR:MASTER_PORT. Raises UserError if process 0 cannot be reached."""
        launch = cls(None, rank(), world_size())
        if launch.world_size > 1:
            launch.store = launch._connect_store()
        return launch

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, exc_type: object, error: BaseException | None, traceback: object) -> None:
        self._has_left = True
        with contextlib.suppress(DistError):  # the store has ended with its process: nobody is left to inform
            if isinstance(error, Exception):
                self.store.set("failed", f"process {self.rank} on {self.machine}: {first_line(error)}")
            left = self.store.add("left", 1)
            deadline = time.monotonic() + 5  # process 0 may serve the store: the others may still read from it
            while self.is_main_process and left < self.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                left = self.store.add("left", 0)

    def on_main_process(self, work: Callable[[], T], doing: str, advice: str = "") -> T:
        """Call `work` on the main process and return its value on all processes, where it arrives as a pickle.

        A transient error of the file system is retried once. If `work` raises UserError or OSError, all processes raise
        UserError, with `advice` at its end if an exception of another kind was the cause.

        Args:
            doing: what the main process does meanwhile, such as "listing images".
        """
        value, problem = None, ""
        if self.is_main_process:
            try:
                with files.user_errors():
                    value = files.retry_once(work)
            except UserError as error:
                # A verdict of our own has its own advice.
                problem = f"{error}{advice if error.__context__ else ''}"
        [(value, problem)] = self._exchange((value, problem), [0], doing)
        if problem:
            raise UserError(problem)
        return value

    def gather(self, value: T, doing: str) -> list[T]:
        """Return the values of all processes, by rank; each arrives as a pickle."""
        return self._exchange(value, range(self.world_size), doing)

    def wait_for_everyone(self, doing: str) -> None:
        """Wait until all processes have made this call."""
        self.gather(None, doing)

    def stop_requested(self, reason: str) -> str:
        """Return the reason to stop that any process has given, "" for none; the same on all processes.

        The main process decides. At each poll it overwrites `poll` by the number of this poll and the reason. Each
        other process waits until `poll` has reached its own number; if it is beyond, the run did not stop at this poll.
        """
        self._num_polls += 1
        if reason:
            self.store.set("stop", reason)
        if self.is_main_process:
            reason = self.store.get("stop").decode() if self.store.check(["stop"]) else ""
            self.store.set("poll", f"{self._num_polls} {reason}")
            return reason

        def newest_poll() -> tuple[int, str] | None:
            if not self.store.check(["poll"]):
                return None
            number, _, decided = self.store.get("poll").decode().partition(" ")
            return (int(number), decided) if int(number) >= self._num_polls else None

        number, decided = self._wait(newest_poll, "process 0 (exchanging signals)")
        return decided if number == self._num_polls else ""

    def end_with_others(self) -> None:
        """End this process soon after another one has failed, or the store is lost, if it does not end in its own way.

        Under NCCL the end of a process raises no exception in the others: each blocks, until a time-out of minutes.
        """

        def watch() -> None:
            problem = ""
            while not (problem or self._has_left):
                time.sleep(FAILURE_POLL_SECONDS)
                try:
                    problem = self.store.get("failed").decode() if self.store.check(["failed"]) else ""
                except DistError:
                    problem = "the connection to process 0 or its launcher is lost"
            time.sleep(FAILURE_SECONDS)
            if not self._has_left:
                print(f"process {self.rank} on {self.machine}: stopped because {problem}", file=sys.stderr, flush=True)
                os._exit(1)

        if self.world_size > 1:
            threading.Thread(target=watch, daemon=True).start()

    def _exchange(self, value: T, ranks: Sequence[int], doing: str) -> list[T]:
        """Return the values of the processes `ranks`."""
        if self.world_size == 1:
            return [value]
        self._num_calls += 1
        call = self._num_calls
        if self.rank in ranks:
            data, key = zlib.compress(pickle.dumps(value), level=1), f"{call}/{self.rank}"
            part = 4 << 20  # the store takes 8 MB at a time; the paths of ImageNet's images are 16 MB, compressed
            for start in range(0, len(data), part):
                self.store.append(f"{key}/data", data[start : start + part])
            self.store.set(key, "complete")

        def take(rank: int) -> T:
            key = f"{call}/{rank}"
            self._wait(lambda: self.store.check([key]) or None, f"process {rank} ({doing})")
            return pickle.loads(zlib.decompress(self.store.get(f"{key}/data")))

        return [value if rank == self.rank else take(rank) for rank in ranks]

    def _wait(self, get: Callable[[], T | None], waits_for: str) -> T:
        """Poll until `get` returns a value; print what it waits for after a minute."""
        # Polling, because torch's blocking `get` prints a warning at each time-out and blocks signal handlers.
        start_seconds = time.monotonic()
        poll_seconds, next_check, next_report = 0.0005, FAILURE_POLL_SECONDS, REPORT_SECONDS
        while (value := get()) is None:
            time.sleep(poll_seconds)
            poll_seconds = min(2 * poll_seconds, 0.25)
            waited = time.monotonic() - start_seconds
            if waited > next_check:
                next_check = waited + FAILURE_POLL_SECONDS
                # The process that failed may have given its value before: then continue.
                if self.store.check(["failed"]) and get() is None:
                    raise ProcessError(f"stopped because {self.store.get('failed').decode()}")
                if launcher_has_ended():
                    raise ProcessError(f"stopped while waiting for {waits_for}: the launcher has ended")
            if waited > next_report:
                next_report *= 2
                this = f"process {self.rank} on {self.machine}"
                print(f"{this}: waiting for {waits_for}, {duration(waited)}", file=sys.stderr)
        return value

    def _connect_store(self) -> Store:
        """Connect to the store that the launcher serves or, if it serves none, process 0."""
        try:
            host, port, _ = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["LOCAL_RANK"]
        except (KeyError, ValueError):
            raise UserError(
                f"{self.world_size} processes were launched without MASTER_ADDR, MASTER_PORT and LOCAL_RANK; start "
                "them with accelerate launch or torchrun"
            ) from None
        serves = self.is_main_process and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        deadline = time.monotonic() + CONNECT_SECONDS

        def connect() -> Store | None:
            try:
                if not serves:  # torch prints a traceback of C++ at each attempt that fails
                    socket.create_connection((host, port), timeout=FAILURE_POLL_SECONDS).close()
                timeout = timedelta(seconds=REPORT_SECONDS)
                store = TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timeout)
                store.set_timeout(timedelta(seconds=CONNECT_SECONDS))  # NCCL meets through it, when the first is late
                return store
            except (OSError, DistError, ValueError, OverflowError) as error:
                may_be_late = isinstance(error, (OSError, DistError)) and not self.is_main_process
                if may_be_late and time.monotonic() < deadline:
                    return None
                problem = "open the store" if serves else "reach process 0"
                raise UserError(
                    f"process {self.rank} on {self.machine} cannot {problem} at {host}:{port} ({first_line(error)}); "
                    "check the address, the port, which another program may use, and the firewall"
                ) from None

        store = self._wait(connect, f"process 0 at {host}:{port}")
        # An elastic restart, possibly with fewer processes, must not find the keys of the attempt before it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"attempt {attempt} of {self.world_size}", store)
