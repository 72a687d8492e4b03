"""What this machine has: its device, cores and memory; the precisions it computes in."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from resnet_in1k.utils.errors import ProcessError, UserError
from resnet_in1k.utils.format import first_line

ACCELERATE_DEVICES = ("cuda", "xpu", "mps", "npu", "mlu", "musa", "sdaa", "hpu", "neuron")
"""The types that Accelerate chooses an accelerator from; beside any other it takes the CPU."""
VISIBLE_DEVICES = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
"""The environment variable that hides devices, by type."""


def device_type() -> str:
    """The type of the device that this process will use, Accelerate's choice: torch's accelerator, or the CPU.

    Asked without initializing it, so that processes can still be forked.
    """
    # The words that Accelerate takes for true.
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y", "t", "on"):
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None and accelerator.type in ACCELERATE_DEVICES else "cpu"


@dataclass(frozen=True)
class Capabilities:
    """What a type of device offers for working while the host does something else."""

    streams: bool
    """Streams beside that of the computation: batches are copied and augmented there during the step before."""
    timing_events: bool
    """Events in the device's queue that tell the time between them."""
    pinned_memory: bool
    """Host memory from which the device copies while the host goes on."""


@functools.cache
def capabilities(device: str) -> Capabilities:
    """Of a type of device, found by trying; a CPU has none, as its work is synchronous.

    Initializes the device: to be called when all loader workers have been forked.
    """
    attempts = {"streams": _try_streams, "timing_events": _try_timing_events, "pinned_memory": _try_pinned_memory}
    here = torch.device(device)
    return Capabilities(**{name: device != "cpu" and _works(attempt, here) for name, attempt in attempts.items()})


@functools.cache
def has_fused_optimizers(device: str) -> bool:
    """Whether optimizers there work in one kernel, and leave everything as it is where `found_inf` says so."""
    return _works(_try_fused_optimizer, torch.device(device))


def missing_capabilities(device: str) -> list[str]:
    """What that type of device lacks, with what this means, in words; nothing for a CPU."""
    if device == "cpu":
        return []
    has, fused = capabilities(device), has_fused_optimizers(device)
    meanings = [
        (has.streams, "no side stream: batches are copied and augmented between steps, not during them"),
        (has.timing_events, "no timing events: the host waits for the device to time loading and training"),
        (has.pinned_memory, "no pinned memory: the host waits while a batch is copied to the device"),
        (fused, "no fused optimizer: weights are copied at each step, to undo one that diverges"),
    ]
    return [meaning for is_there, meaning in meanings if not is_there]


def _works(attempt: Callable[[torch.device], bool], device: torch.device) -> bool:
    try:
        return attempt(device)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError):
        return False  # these are what torch raises for what a backend lacks


def _try_streams(device: torch.device) -> bool:
    compute, side = torch.accelerator.current_stream(device), torch.Stream(device)
    with side:
        values = torch.ones(1, device=device)
    compute.wait_stream(side)
    values.record_stream(compute)
    return side != compute


def _try_timing_events(device: torch.device) -> bool:
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    start.record()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) >= 0


def _try_pinned_memory(device: torch.device) -> bool:
    pinned = torch.ones(1, pin_memory=True)
    return pinned.is_pinned() and pinned.to(device, non_blocking=True).item() == 1


def _try_fused_optimizer(device: torch.device) -> bool:
    weight = torch.nn.Parameter(torch.ones(1, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    optimizer.found_inf = torch.ones((), device=device)  # type: ignore[attr-defined]
    optimizer.step()
    return weight.item() == 1


def has_fast_bf16(device: str) -> bool:
    """Whether bf16 is faster than fp32 on that type of device. Does not need the device to be initialized."""
    if device != "cpu":
        is_supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        if is_supported is None:
            return False
        try:
            return is_supported(including_emulation=False)
        except TypeError:  # a backend that never emulates
            return is_supported()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        instructions = torch.cpu.get_capabilities()
        return bool(instructions.get("amx_bf16") or instructions.get("avx512_bf16"))
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def hardware_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU's with its cores."""
    if device.type != "cpu":
        get_name = getattr(torch.get_device_module(device), "get_device_name", None)
        return get_name(device) if get_name else device.type.upper()
    instructions = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return f"{instructions.get('cpu_name', 'CPU')}, {usable_cores()} cores"


def local_world_size() -> int:
    """Processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_cores() -> int:
    """Physical cores of this machine that this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed, _container_cores()))


def _container_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """A container's CPU quota in cores, as `docker --cpus` sets it; a very large number where there is none."""
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return 1 << 20


def choose_cpu_threads(device: torch.device, cpu_threads: int | None) -> int:
    """Set and return the number of threads for computing on the CPU.

    `accelerate launch` without a configuration sets OMP_NUM_THREADS=1: a training without a GPU would then run on one
    core. So on a CPU the physical cores are divided among this machine's processes.
    """
    if cpu_threads is None and device.type == "cpu":
        cpu_threads = max(1, usable_cores() // local_world_size())
    if cpu_threads is not None:
        torch.set_num_threads(cpu_threads)
    return torch.get_num_threads()


def choose_workers(workers: int | None) -> int:
    """Loader workers of this process. On a CPU the cores are needed for training, which is far slower than decoding."""
    if workers is not None:
        return workers
    cores = max(1, usable_cores() // local_world_size())
    return max(1, cores // 8) if device_type() == "cpu" else min(cores, 32)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, whichever of its libraries allocated, or of the CPU."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextlib.contextmanager
def translate_memory_errors(num_images: int) -> Iterator[None]:
    """Raises ProcessError where a forward pass of so many images does not fit into memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ProcessError(
            f"out of memory with {num_images} images in a forward pass for evaluation "
            f"({first_line(error)}); take a smaller --image-size or, where there is one, --batch-size"
        ) from None


def check_enough_gpus() -> None:
    """Raises UserError if there are GPUs, but fewer than processes on this machine, before NCCL's obscure error."""
    kind, needed = device_type(), local_world_size()
    visible = torch.accelerator.device_count() if kind != "cpu" else 0
    if 0 < visible < needed:
        check = f", or check {VISIBLE_DEVICES[kind]}" if kind in VISIBLE_DEVICES else ""
        raise UserError(
            f"{needed} processes were launched on this machine, but only {visible} "
            f"{'GPU is' if visible == 1 else 'GPUs are'} visible; set num_processes: {visible} in the Accelerate "
            f"config (or --num_processes {visible}){check}"
        )


CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that can be allocated before the machine swaps or a limit ends a process.

    Docker, Slurm and Kubernetes limit memory by cgroups, which psutil does not look at. A limit may be set on any
    group above this process's own.
    """
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """Bytes left in each group that has a limit, of cgroup version 1 or 2."""
    try:
        lines = OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.strip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(root):
                yield from _left_in(folder, *names)


def _left_in(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    # ValueError: "max" for no limit.
    with contextlib.suppress(OSError, ValueError):
        limit, usage = (int((folder / name).read_text(encoding="ascii")) for name in (limit_name, usage_name))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        # The page cache counts as used, but is dropped where memory is needed.
        yield max(0, limit - usage + int(statistics.get(cache_name, 0)))


PrecisionFlag = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Precision:
    flag: PrecisionFlag
    """As --precision takes it."""
    label: str
    """As people read it."""
    autocast_dtype: torch.dtype | None
    """None: no autocast."""


PRECISIONS: dict[str, Precision] = {
    "no": Precision("fp32", "float32", None),
    "bf16": Precision("bf16", "bfloat16 autocast", torch.bfloat16),
    "fp16": Precision("fp16", "float16 autocast", torch.float16),
}
"""By Accelerate's name, which is also what recipe.json records as mixed_precision."""

ACCELERATE_NAMES: dict[PrecisionFlag, str] = {precision.flag: name for name, precision in PRECISIONS.items()}


@contextlib.contextmanager
def reproducible_float32() -> Iterator[None]:
    """Float32 that is no TF32, which moves logits by about 1e-3, and algorithms that are not chosen by timing."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision
    cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision = False, True, "ieee", "ieee"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision = before
