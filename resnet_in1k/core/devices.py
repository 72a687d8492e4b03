"""What this machine has: its device, its cores, its memory; how many threads and workers follow from that."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from resnet_in1k.core.errors import ProcessError, UserError
from resnet_in1k.core.text import first_line


def device_type() -> str:
    """CUDA or the CPU. Asked without initialising CUDA, so that processes can still be forked."""
    # Not Apple's MPS: it is asynchronous in ways that the prefetching and the stopwatch do not provide for.
    forced = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return "cuda" if torch.cuda.is_available() and not forced else "cpu"


def has_fast_bf16(device: str) -> bool:
    """Whether bf16 is faster than fp32 there: tensor cores, or a CPU with AMX or AVX512-BF16 instructions."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return f"{capabilities.get('cpu_name', 'CPU')}, {usable_cores()} cores"


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
def inference_memory_explained(num_images: int) -> Iterator[None]:
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
    needed, visible = local_world_size(), torch.cuda.device_count()
    if 0 < visible < needed:
        raise UserError(
            f"{needed} processes were launched on this machine, but only {visible} "
            f"{'GPU is' if visible == 1 else 'GPUs are'} visible; set num_processes: {visible} in the Accelerate "
            f"config (or --num_processes {visible}), or check CUDA_VISIBLE_DEVICES"
        )
