"""Which device, how many processes, which precision, how many threads: asked once, checked, and said."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, LoggerType

from resnet_in1k.errors import ProcessError, UserError, first_line

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(
    precision: Precision = "auto", report_to: str | None = None, tracker_folder: Path | None = None
) -> Accelerator:
    """Accelerate's view of this process among the others.

    `precision` "auto" takes the launch configuration's mixed precision; where that says nothing, which Accelerate does
    not tell from "no", it is bf16 if the device is fast at it and fp32 if not.

    Raises:
        UserError: if fewer GPUs are visible than processes were started here, if the processes do not find one another,
            or if the tracker is unknown or not installed.
    """
    check_enough_gpus()
    use_cpu = not _accelerator_visible()
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched != "no":
            mixed_precision = launched
        else:
            mixed_precision = "bf16" if has_fast_bf16(torch.device("cpu" if use_cpu else _device_type())) else "no"
    else:
        mixed_precision = _ACCELERATE_NAMES[precision]

    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # gradients need not be copied to be sent
    try:
        accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision=mixed_precision,
            kwargs_handlers=[ddp],
            log_with=_tracker(report_to),
            project_dir=tracker_folder,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"Accelerate cannot start here: {first_line(error)}") from error
    if report_to and not accelerator.log_with:
        raise UserError(f"--report-to {report_to}: not installed; pip install {report_to}, or leave the flag out")

    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if expected != accelerator.num_processes:
        raise UserError(
            f"{expected} processes were launched, but this one sees {accelerator.num_processes}: they would be "
            "unrelated runs in one folder; start them with accelerate launch or torchrun"
        )
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes hardly change
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions use by default
    return accelerator


def check_enough_gpus() -> None:
    """Raises UserError if there are GPUs, but fewer than processes on this machine: NCCL's own words are obscure."""
    wanted, visible = local_world_size(), torch.cuda.device_count()
    if 0 < visible < wanted:
        raise UserError(
            f"{wanted} processes were launched on this machine, but only {visible} "
            f"{'GPU is' if visible == 1 else 'GPUs are'} visible; set num_processes: {visible} in the Accelerate "
            f"config (or --num_processes {visible}), or check CUDA_VISIBLE_DEVICES"
        )


def _tracker(report_to: str | None) -> str | None:
    known = [str(tracker) for tracker in LoggerType if str(tracker) != "all"]
    if report_to is not None and report_to not in known:
        raise UserError(f"--report-to {report_to}: unknown tracker; Accelerate knows {', '.join(known)}")
    return report_to


def _accelerator_visible() -> bool:
    forced = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return not forced and _device_type() != "cpu"


def _device_type() -> str:
    """CUDA or the CPU: Apple's MPS is asynchronous in ways that this project's copies and clocks do not allow for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: tensor cores, or a CPU with AMX or AVX512-BF16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def local_world_size() -> int:
    """Processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_cores() -> int:
    """Physical cores of this machine that this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed, _container_cores()))


def _container_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """What a container's CPU quota comes to, as `docker --cpus` sets it; very many where there is none."""
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return 1 << 20


def choose_cpu_threads(device: torch.device, cpu_threads: int | None) -> int:
    """Set and return the number of threads for computing on the CPU.

    `accelerate launch` without a configuration sets OMP_NUM_THREADS=1: a training without a GPU would then run on one
    core, in silence. So on a CPU the physical cores are shared out among this machine's processes.
    """
    if cpu_threads is not None and cpu_threads < 1:
        raise UserError(f"--cpu-threads {cpu_threads}: at least 1")
    if cpu_threads is None and device.type == "cpu":
        cpu_threads = max(1, usable_cores() // local_world_size())
    if cpu_threads is not None:
        torch.set_num_threads(cpu_threads)
    return torch.get_num_threads()


def choose_workers(device: torch.device, workers: int | None) -> int:
    """Loader workers of this process. On a CPU the cores are needed for training, which is far slower than decoding."""
    if workers is not None:
        if workers < 0:
            raise UserError(f"--workers {workers}: at least 0")
        return workers
    cores = max(1, usable_cores() // local_world_size())
    return max(1, cores // 8) if device.type == "cpu" else min(cores, 32)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, whichever of its libraries asked for it, or of the CPU."""
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


@contextlib.contextmanager
def lost_processes_explained() -> Iterator[None]:
    """Raises ProcessError where this process cannot reach the others any more: one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        reason = first_line(error).rpartition("] ")[2]
        raise ProcessError(
            f"process {os.environ.get('RANK', '0')} has lost the others ({reason}): one of them has ended, and the "
            "launcher or its last line says why; what was saved is intact, go on with --resume"
        ) from None


def share_buffers(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Give all processes rank 0's buffers.

    DDP does so before each training forward only: after it, each process has counted its own images in.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return f"{capabilities.get('cpu_name', 'CPU')}, {usable_cores()} cores"
    return device.type
