"""The processes of one launch: which of them this is, how they exchange values, and their Accelerator."""

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
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    LoggerType,
)
from torch.distributed import DistError, PrefixStore, Store, TCPStore

import resnet_in1k
from resnet_in1k.utils import files
from resnet_in1k.utils.device import ACCELERATE_NAMES, PrecisionFlag, check_enough_gpus, device_type, has_fast_bf16
from resnet_in1k.utils.errors import ProcessError, UserError
from resnet_in1k.utils.format import duration, first_line

T = TypeVar("T")

SAVED_IS_INTACT = "; what was saved before is intact: fix that and go on with --resume"
MAX_POLL_SECONDS = 0.25
"""Between two looks of a waiting process, after shorter ones."""
FAILURE_POLL_SECONDS = 2.0
"""Between two looks for a failure of another process, or of the launcher."""
REPORT_SECONDS = 60.0
"""A process that has waited so long says so, and again after twice that time, and so on."""
CONNECT_SECONDS = 1800.0
"""Machines of one job may start many minutes apart."""
PART_BYTES = 4 << 20
LEAVE_SECONDS = 5.0
"""How long process 0, which may serve the store, waits at its end for the others to have read it."""


def world_size() -> int:
    """Processes of this launch on all machines, as the launcher says before any of them is connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def launcher_has_ended() -> bool:
    """Whether the launcher that started this process was killed: it can forward no signals any more."""
    launched = {"ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"} & os.environ.keys()  # only launchers set these
    return bool(launched) and os.getppid() != resnet_in1k.PARENT_PROCESS_ID


class Launch:
    """This process among those of its launch; all of them call each method alike, in the same order.

    Use it as a context: a process that fails in the body tells those that wait for it.
    """

    def __init__(self, store: Store | None = None, rank: int = 0, world_size: int = 1):
        """Without a store the process is alone."""
        self.rank, self.world_size = rank, world_size
        self.machine = socket.gethostname()
        self._group_store = store
        self._calls = 0
        self._polls = 0
        if store is not None:
            self._store = PrefixStore("launch", store)

    @classmethod
    def connect(cls) -> "Launch":
        """Join the others of this launch at MASTER_ADDR:MASTER_PORT.

        Raises:
            UserError: if the main process cannot be reached.
        """
        if world_size() == 1:
            return cls()
        with launcher_watched():
            return cls(_connect_store(), rank(), world_size())

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def start_process_group(self, backend: str, timeout: timedelta) -> None:
        """Once, if there are several processes."""
        if self._group_store is not None and not torch.distributed.is_initialized():
            with launcher_watched():
                torch.distributed.init_process_group(
                    backend,
                    store=PrefixStore("group", self._group_store),
                    rank=self.rank,
                    world_size=self.world_size,
                    timeout=timeout,
                )

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._group_store is None:
            return
        try:
            if isinstance(error, Exception):
                self._store.set("failed", f"process {self.rank} on {self.machine}: {first_line(error)}")
            left = self._store.add("left", 1)
            deadline = time.monotonic() + LEAVE_SECONDS
            while self.is_main_process and left < self.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                left = self._store.add("left", 0)
        except DistError:  # the store has ended with its process: nobody is left to tell
            pass

    def broadcast_from_main(self, make: Callable[[], T], doing: str) -> T:
        """What `make` returns on the main process, on all processes. The value is pickled.

        Args:
            doing: what the main process does meanwhile, as in "lists the images".

        Raises:
            UserError: on all processes, if `make` raises it.
        """
        if self._group_store is None:
            return make()
        self._calls += 1
        key = f"{self._calls}"
        if self.is_main_process:
            try:
                outcome: tuple[str, Any] = ("", make())
            except UserError as error:
                outcome = (str(error), None)
            self._put(key, outcome)
        else:
            outcome = self._take(key, f"process 0, which {doing}")
            self._delete_after(self.world_size - 1, [key])
        problem, value = outcome
        if problem:
            raise UserError(problem)
        return value

    def on_main_process(self, write: Callable[[], None], doing: str, advice: str = SAVED_IS_INTACT) -> None:
        """Let the main process write while the others wait; if it fails, all raise UserError with `advice`.

        A transient error of the file system is retried once.
        """
        if problem := self.broadcast_from_main(lambda: files.failure_of(write), doing):
            raise UserError(problem + advice)

    def gather(self, value: T, doing: str) -> list[T]:
        """All processes' values, by rank; each is pickled."""
        if self._group_store is None:
            return [value]
        self._calls += 1
        keys = [f"{self._calls}/{rank}" for rank in range(self.world_size)]
        self._put(keys[self.rank], value)
        values = [self._take(key, f"process {rank}, which {doing}") for rank, key in enumerate(keys)]
        self._delete_after(self.world_size, keys)
        return values

    def agreed_signal(self, number: int) -> int:
        """The number of a signal to stop that any process has received, 0 for none: the same on all processes.

        The main process decides. Of a signal that another receives just now, all learn at the next call.
        """
        if self._group_store is None:
            return number
        self._polls += 1
        key = f"signal/{self._polls}"
        if not self.is_main_process:
            if number:
                self._store.set("signal", str(number))
            return int(self._bytes(key, "process 0, which trains"))
        if not number and self._store.check(["signal"]):
            number = int(self._store.get("signal"))
        self._store.set(key, str(number))
        if self._polls > 64:  # the gradients are averaged at each step, so nobody is so far behind
            self._store.delete_key(f"signal/{self._polls - 64}")
        return number

    def _delete_after(self, num_readers: int, keys: list[str]) -> None:
        """By the last of those who read them."""
        counter = f"{self._calls}/read"
        if self._store.add(counter, 1) == num_readers:
            parts = [part for key in keys for part in _parts(key, int(self._store.get(key)))]
            for key in [*parts, *keys, counter]:
                self._store.delete_key(key)

    def _put(self, key: str, value: Any) -> None:
        # The paths of ImageNet's images are 59 MB, compressed 16; the store takes no value of over 8.
        data = zlib.compress(pickle.dumps(value), level=1)
        parts = _parts(key, num_parts=-(-len(data) // PART_BYTES))
        for number, part in enumerate(parts):
            self._store.set(part, data[number * PART_BYTES : (number + 1) * PART_BYTES])
        self._store.set(key, str(len(parts)))  # last: then all parts are there

    def _take(self, key: str, waits_for: str) -> Any:
        num_parts = int(self._bytes(key, waits_for))
        return pickle.loads(zlib.decompress(b"".join(self._store.get(part) for part in _parts(key, num_parts))))

    def _bytes(self, key: str, waits_for: str) -> bytes:
        # Not by a get that waits: it would print a warning of torch's at each time-out, and let no signal through.
        start_seconds = failure_seconds = time.monotonic()
        poll_seconds, report_seconds = 0.0005, REPORT_SECONDS
        while not self._store.check([key]):
            time.sleep(poll_seconds)
            poll_seconds = min(2 * poll_seconds, MAX_POLL_SECONDS)
            now_seconds = time.monotonic()
            if now_seconds - failure_seconds > FAILURE_POLL_SECONDS:
                failure_seconds = now_seconds
                self._stop_after_failure(key, waits_for)
            if now_seconds - start_seconds > report_seconds:
                report_seconds *= 2
                waited = duration(now_seconds - start_seconds)
                print(f"process {self.rank} on {self.machine} waits for {waits_for}: {waited}", file=sys.stderr)
        return self._store.get(key)

    def _stop_after_failure(self, key: str, waits_for: str) -> None:
        # A process that fails may have given its value before: then all go on alike.
        if self._store.check(["failed"]) and not self._store.check([key]):
            raise ProcessError(f"stopped, as {self._store.get('failed').decode()}")
        if launcher_has_ended():
            raise ProcessError(f"stopped while waiting for {waits_for}: the launcher has ended")


@contextlib.contextmanager
def launcher_watched() -> Iterator[None]:
    """In the body, which may block for minutes without running Python, the end of the launcher ends this process."""
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


def _parts(key: str, num_parts: int) -> list[str]:
    return [f"{key}/part/{number}" for number in range(num_parts)]


def _connect_store() -> Store:
    """A client of the store that the launcher serves or, without one, process 0."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            f"{world_size()} processes were launched, but MASTER_ADDR and MASTER_PORT do not say where they meet; "
            "start them with accelerate launch or torchrun"
        ) from None
    launcher_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            store = TCPStore(
                host,
                port,
                is_master=rank() == 0 and not launcher_serves,
                wait_for_workers=False,
                timeout=timedelta(seconds=REPORT_SECONDS),
            )
            # Restarted processes, of which there may be fewer, must not find what those before them have left there.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return PrefixStore(f"attempt {attempt} of {world_size()}", store)
        except (DistError, ValueError) as error:
            if rank() == 0 or time.monotonic() > deadline or isinstance(error, ValueError):
                raise UserError(
                    f"process {rank()} on {socket.gethostname()} cannot reach process 0 at {host}:{port} "
                    f"({first_line(error)}); check the address, the port and the firewall"
                ) from None
            print(f"process {rank()} on {socket.gethostname()} waits for process 0 at {host}:{port}", file=sys.stderr)


COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""NCCL's default of 10 would end a run when one worker's network storage hangs for so long."""
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""By the variable that `accelerate launch` sets for them."""


def make_accelerator(
    launch: Launch,
    precision: PrecisionFlag = "auto",
    report_to: str | None = None,
    tracker_folder: Path | None = None,
    compress_gradients: bool = False,
) -> Accelerator:
    """Connect this process with the others of its launch.

    `precision` "auto" takes the launch configuration's mixed precision; where that says nothing, which Accelerate does
    not distinguish from "no", it is bf16 if the device is fast at it and fp32 if not.

    Raises:
        UserError: if fewer GPUs are visible than processes were started here, if the processes cannot connect, if the
            launch configuration divides the model, or if the tracker is unknown or not installed.
    """
    check_enough_gpus()
    device = device_type()
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() == "true":
            _refuse_distributed_type(name)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "auto":
        mixed_precision = ACCELERATE_NAMES[precision]
    elif launched != "no":
        mixed_precision = launched
    else:
        mixed_precision = "bf16" if has_fast_bf16(device) else "no"
    try:
        if launch.world_size > 1:
            if device == "cpu":
                choose_gloo_interface()
            backend = torch.distributed.get_default_backend_for_device(device)
            launch.start_process_group(backend, COLLECTIVE_TIMEOUT)
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=mixed_precision,
            kwargs_handlers=[_ddp_settings(compress_gradients)],
            # Given, so that ACCELERATE_GRADIENT_ACCUMULATION_STEPS does not divide the loss a second time.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=_tracker(report_to),
            project_dir=tracker_folder,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"Accelerate cannot start here: {first_line(error)}") from error
    if report_to and not accelerator.log_with:
        raise UserError(f"--report-to {report_to}: not installed; pip install {report_to}, or leave the flag out")
    if world_size() != accelerator.num_processes:
        raise UserError(
            f"{world_size()} processes were launched, but this one sees {accelerator.num_processes}: they would be "
            "unrelated runs in one folder; start them with accelerate launch or torchrun"
        )
    distributed_type = str(accelerator.distributed_type.value)
    if distributed_type != "NO" and not distributed_type.startswith("MULTI_"):
        _refuse_distributed_type(distributed_type)
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes hardly change
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # as cuDNN's convolutions use by default
    return accelerator


def _refuse_distributed_type(name: str) -> None:
    raise UserError(
        f"the launch configuration asks for {name}, which divides a model among devices; a ResNet has 12 to 60 million "
        "parameters and fits on each whole: use distributed_type MULTI_GPU, as in accelerate_configs/two_gpu.yaml"
    )


def _ddp_settings(compress_gradients: bool) -> DistributedDataParallelKwargs:
    return DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,  # gradients need not be copied to be sent
        comm_hook=DDPCommunicationHookType.BF16 if compress_gradients else DDPCommunicationHookType.NO,
    )


def _tracker(report_to: str | None) -> str | None:
    known = [str(tracker) for tracker in LoggerType if str(tracker) != "all"]
    if report_to is not None and report_to not in known:
        raise UserError(f"--report-to {report_to}: unknown tracker; Accelerate knows {', '.join(known)}")
    return report_to


def choose_gloo_interface() -> None:
    """Let Gloo use the network interface that leads to process 0, unless GLOO_SOCKET_IFNAME is set.

    By itself it takes the one that the host's name resolves to. On many machines that is 127.0.1.1, by /etc/hosts, and
    no other machine can connect.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with contextlib.suppress(OSError, KeyError):
        family, kind, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing, but asks for the route
            ours = probe.getsockname()[0]
        for interface, addresses in psutil.net_if_addrs().items():
            if any(each.address.partition("%")[0] == ours for each in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = interface


CONNECTION_LOST = (
    *("Connection closed", "Connection reset", "Connection was likely closed", "Broken pipe"),
    *("Timed out", "timed out", "remote process"),
)


@contextlib.contextmanager
def translate_process_errors() -> Iterator[None]:
    """Raises ProcessError for a failed collective: because another process has ended, or with the whole reason."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        if any(words in str(error) for words in CONNECTION_LOST):
            reason = first_line(error).rpartition("] ")[2]
            raise ProcessError(
                f"process {rank()} has lost the others ({reason}): one of them has ended, and the launcher or its "
                "last line says why; what was saved is intact, go on with --resume"
            ) from None
        reason = " ".join(str(error).split())
        raise ProcessError(
            f"process {rank()} cannot communicate with the others: {reason}; NCCL_DEBUG=INFO says more, df -h /dev/shm "
            "whether shared memory is short, and GLOO_SOCKET_IFNAME chooses the network interface"
        ) from None


def broadcast_buffers(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Give all processes rank 0's buffers: where they are saved or evaluated, not at each step.

    Each process updates its norm statistics alone, and training does not read them.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
