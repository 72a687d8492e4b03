"""Accelerate for the processes of a launch: its set-up, and errors that a lost process causes."""

import contextlib
import os
import socket
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

from resnet_in1k.utils.device import ACCELERATE_NAMES, PrecisionFlag, check_enough_gpus, device_type, has_fast_bf16
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line
from resnet_in1k.utils.launch import Launch, world_size

UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""Distributed types that divide the model, by the variable that `accelerate launch` sets for them."""


def make_accelerator(
    launch: Launch,
    precision: PrecisionFlag = "auto",
    report_to: str | None = None,
    tracker_folder: Path | None = None,
    compress_gradients: bool = False,
) -> Accelerator:
    """Connect this process with the others of its launch and return its Accelerator.

    Args:
        precision: "auto" takes the launch configuration's mixed precision. If that is "no", which Accelerate also sets
            if nothing is configured, "auto" is bf16 on devices that are fast at it, else fp32.

    Raises:
        UserError: if fewer GPUs are visible than processes were started here, if the processes cannot connect, if the
            launch configuration divides the model, or if the tracker is unknown or not installed.
    """
    check_enough_gpus()
    device = device_type()
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() == "true":
            _refuse_distributed_type(name)
    trackers = [str(tracker) for tracker in LoggerType if str(tracker) != "all"]
    if report_to is not None and report_to not in trackers:
        raise UserError(f"--report-to {report_to}: unknown tracker; Accelerate has {', '.join(trackers)}")
    try:
        if launch.world_size > 1:
            if device == "cpu":
                choose_gloo_interface()
            launch.start_process_group(torch.distributed.get_default_backend_for_device(device))
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=_mixed_precision(precision, device),
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True,  # gradients need not be copied to be sent
                    comm_hook=DDPCommunicationHookType.BF16 if compress_gradients else DDPCommunicationHookType.NO,
                )
            ],
            # Given, so that ACCELERATE_GRADIENT_ACCUMULATION_STEPS does not divide the loss a second time.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=report_to,
            project_dir=tracker_folder,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"Accelerate cannot start here: {first_line(error)}") from error
    if report_to and not accelerator.log_with:
        raise UserError(f"--report-to {report_to}: not installed; pip install {report_to}, or omit the flag")
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
    return accelerator


def _mixed_precision(precision: PrecisionFlag, device: str) -> str:
    if precision != "auto":
        return ACCELERATE_NAMES[precision]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":
        return launched
    return "bf16" if has_fast_bf16(device) else "no"


def _refuse_distributed_type(name: str) -> None:
    raise UserError(
        f"the launch configuration asks for {name}, which divides a model among devices; a ResNet has 12 to 60 million "
        "parameters and fits on one: use distributed_type MULTI_GPU, as in accelerate_configs/two_gpu.yaml"
    )


def choose_gloo_interface() -> None:
    """Let Gloo use the network interface that leads to process 0, unless GLOO_SOCKET_IFNAME is set.

    Gloo's own choice is the interface of the host's name. On many machines /etc/hosts makes that 127.0.1.1, which no
    other machine can reach.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with contextlib.suppress(OSError, KeyError):
        family, kind, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing; the kernel chooses the route
            own_address = probe.getsockname()[0]
        for interface, addresses in psutil.net_if_addrs().items():
            if any(each.address.partition("%")[0] == own_address for each in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = interface


def broadcast_buffers(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the buffers of rank 0, before they are saved or evaluated.

    Each process updates its norm statistics alone. Training does not read them, so no broadcast is needed in a step.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
