"""The processes of one run: starting them, letting the main one write, and explaining when one is lost."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    LoggerType,
    broadcast_object_list,
)

from resnet_in1k.core import files
from resnet_in1k.core.devices import check_enough_gpus, device_type, has_fast_bf16
from resnet_in1k.core.errors import ProcessError, UserError
from resnet_in1k.core.precision import ACCELERATE_NAMES, PrecisionFlag
from resnet_in1k.core.text import first_line

SAVED_IS_INTACT = "; what was saved before is intact: fix that and go on with --resume"


def make_accelerator(
    precision: PrecisionFlag = "auto", report_to: str | None = None, tracker_folder: Path | None = None
) -> Accelerator:
    """Start this process among the others.

    `precision` "auto" takes the launch configuration's mixed precision; where that says nothing, which Accelerate does
    not distinguish from "no", it is bf16 if the device is fast at it and fp32 if not.

    Raises:
        UserError: if fewer GPUs are visible than processes were started here, if the processes cannot connect, or if
            the tracker is unknown or not installed.
    """
    check_enough_gpus()
    device = device_type()
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "auto":
        mixed_precision = ACCELERATE_NAMES[precision]
    elif launched != "no":
        mixed_precision = launched
    else:
        mixed_precision = "bf16" if has_fast_bf16(device) else "no"
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=mixed_precision,
            # Gradients need not be copied to be sent.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
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
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes hardly change
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions use by default
    return accelerator


def world_size() -> int:
    """Processes of this launch on all machines, as the launcher says before any of them is connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _tracker(report_to: str | None) -> str | None:
    known = [str(tracker) for tracker in LoggerType if str(tracker) != "all"]
    if report_to is not None and report_to not in known:
        raise UserError(f"--report-to {report_to}: unknown tracker; Accelerate knows {', '.join(known)}")
    return report_to


def on_main_process(accelerator: Accelerator, write: Callable[[], None], advice: str = SAVED_IS_INTACT) -> None:
    """Let the main process write while the others wait; if it fails, all processes raise UserError with `advice`.

    A transient error of the file system is retried once.
    """
    problem = [""]
    if accelerator.is_main_process:
        problem = [files.failure_of(write) or ""]
    if accelerator.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0] + advice)


CONNECTION_LOST = ("Connection closed", "Connection reset", "Timed out", "timed out", "Broken pipe", "remote process")


@contextlib.contextmanager
def lost_processes_explained() -> Iterator[None]:
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
    """Give all processes rank 0's buffers.

    DDP does so before each training forward only: after it, each process has updated its norm statistics alone.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
