"""Accelerate among the processes of a launch: starting it, and explaining when one of them is lost."""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    LoggerType,
)

from resnet_in1k.utils.device import check_enough_gpus, device_type, has_fast_bf16
from resnet_in1k.utils.errors import ProcessError, UserError
from resnet_in1k.utils.format import first_line
from resnet_in1k.utils.launch import Launch, rank, world_size
from resnet_in1k.utils.precision import ACCELERATE_NAMES, PrecisionFlag

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
