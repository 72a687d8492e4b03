"""What this machine has: its device, cores and memory; and the precisions it computes in."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from resnet_in1k.utils.process import local_world_size

ACCELERATE_DEVICES = ("cuda", "xpu", "mps", "npu", "mlu", "musa", "sdaa", "hpu", "neuron")
"""Device types that Accelerate supports; on any other accelerator it uses the CPU."""
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@contextlib.contextmanager
def reproducible_float32() -> Iterator[None]:
    """Compute in float32 without TF32, which moves logits by about 1e-3, and with algorithms not chosen by timing."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision
    cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision = False, True, "ieee", "ieee"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision, cudnn.conv.fp32_precision = before


def cpu_is_requested() -> bool:
    """True if the launch configuration asks for the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y", "t", "on")


def device_type() -> str:
    """Choose the device type of this launch: torch's accelerator, or the CPU.

    utils/distributed.py passes the choice to Accelerate, which gives each process of a machine a device of its own. The
    device is not initialized here, so that processes can still be forked.
    """
    if cpu_is_requested():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None and accelerator.type in ACCELERATE_DEVICES else "cpu"


@functools.cache
def capabilities(device: str) -> frozenset[str]:
    """Return the names in CAPABILITIES that a device type has; a CPU works synchronously and needs only the last.

    This initializes the device: call it after all loader workers have been forked.
    """
    found = set()
    for name in CAPABILITIES if device != "cpu" else ("fused_optimizers",):
        # torch raises one of these for a feature that a backend does not have.
        with contextlib.suppress(RuntimeError, AssertionError, AttributeError, TypeError, ValueError):
            if CAPABILITIES[name][0](torch.device(device)):
                found.add(name)
    return frozenset(found)


def missing_capabilities(device: str) -> list[str]:
    """Return the effect of each missing feature of a device type, one line each; none for a CPU."""
    has = capabilities(device)
    return [effect for name, (_, effect) in CAPABILITIES.items() if device != "cpu" and name not in has]


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU; the host does not wait, if the device copies from pinned memory."""
    pin = "pinned_memory" in capabilities(device.type)
    return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)


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
    if device.type == "mps":  # torch reuses the memory while the GPU still reads it (pytorch#193819)
        return False
    pinned = torch.ones(1, pin_memory=True)
    return pinned.is_pinned() and pinned.to(device, non_blocking=True).item() == 1


def _try_fused_optimizer(device: torch.device) -> bool:
    weight = torch.nn.Parameter(torch.ones(1, device=device))
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0, fused=True).step()
    return weight.item() == 0


CAPABILITIES: dict[str, tuple[Callable[[torch.device], bool], str]] = {
    "streams": (_try_streams, "no side stream: batches are copied and augmented between steps, not during them"),
    "timing_events": (_try_timing_events, "no timing events: the host waits for the device to time its work"),
    "pinned_memory": (_try_pinned_memory, "no pinned memory: the host waits while a batch is copied to the device"),
    "fused_optimizers": (_try_fused_optimizer, "no fused optimizer: one kernel for each operation of the update"),
}
"""Features that let the host work while the device computes: how each is tried, and the effect if it is missing."""


def fastest_precision(device: str) -> str:
    """Return Accelerate's name of the precision that is fastest on a device type and trains as well as float32."""
    if _has_fast_bf16(device):
        return "bf16"
    # V100 and T4 have tensor cores, but only for float16.
    is_volta = device == "cuda" and torch.version.cuda and torch.cuda.get_device_capability()[0] == 7
    return "fp16" if is_volta else "no"


def _has_fast_bf16(device: str) -> bool:
    if device != "cpu":
        is_supported = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: False)
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
    """Return the accelerator's name, or the CPU's with its cores."""
    if device.type != "cpu":
        get_name = getattr(torch.get_device_module(device), "get_device_name", None)
        return get_name(device) if get_name else device.type.upper()
    instructions = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return f"{instructions.get('cpu_name', 'CPU')}, {usable_cores()} cores"


def usable_cores() -> int:
    """Number of physical cores that this process may use."""
    import psutil  # not at the top: prediction in another program does not need it

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(psutil.cpu_count(logical=False) or allowed, allowed)
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2 here, or "max"
        quota, period = map(int, (CGROUPS / "cpu.max").read_text(encoding="ascii").split())  # as by `docker --cpus`
        cores = min(cores, quota // period)
    return max(1, cores)


def choose_cpu_threads(device: torch.device, cpu_threads: int | None) -> int:
    """Set and return the number of threads for computing on the CPU."""
    # `accelerate launch` without a configuration sets OMP_NUM_THREADS=1: training on a CPU would use one core.
    if cpu_threads is None and device.type == "cpu":
        cpu_threads = max(1, usable_cores() // local_world_size())
    if cpu_threads is not None:
        torch.set_num_threads(cpu_threads)
    return torch.get_num_threads()


def choose_workers(num_workers: int | None) -> int:
    """Return the number of loader workers of this process."""
    if num_workers is not None:
        return num_workers
    cores = max(1, usable_cores() // local_world_size())
    # Training on a CPU needs the cores itself; it is far slower than decoding.
    return max(1, cores // 8) if device_type() == "cpu" else min(cores, 32)


def available_memory() -> int:
    """Return the bytes that can be allocated before the machine swaps or a limit ends a process.

    Docker, Slurm and Kubernetes limit memory by cgroups, which psutil ignores. Any group above this process's own may
    have a limit.
    """
    import psutil

    available = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError):  # not Linux
        group = CGROUPS / OWN_CGROUP.read_text(encoding="utf-8").rpartition("0::")[2].strip().strip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max" for no limit
                limit, usage = (int((folder / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
                statistics = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
                # The page cache counts as used, but is dropped when memory is needed.
                available.append(max(0, limit - usage + int(statistics.get("inactive_file", 0))))
    return min(available)
