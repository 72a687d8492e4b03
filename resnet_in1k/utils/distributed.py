"""The set-up of Accelerate for the processes of a launch."""

import contextlib
import os
import socket
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, GradientAccumulationPlugin

from resnet_in1k.utils.device import device_type, has_fast_bf16
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count, first_line
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.process import local_world_size
from resnet_in1k.utils.validation import PrecisionFlag


def make_accelerator(
    launch: Launch,
    precision: PrecisionFlag = "auto",
    report_to: str | None = None,
    tracker_folder: Path | None = None,
    compress_gradients: bool = False,
) -> Accelerator:
    """Connect this process with the others of its launch and return its Accelerator.

    Precision "auto" is that of the launch configuration. If that is "no", which Accelerate sets for none, too,
    "auto" is bf16 on devices that are fast at it, else fp32. Raises UserError if the processes cannot connect, the
    device does not compute in the precision, or the launch is unsuitable: see check_launch.
    """
    check_launch(report_to)
    device, mixed_precision = device_type(), "no" if precision == "fp32" else precision
    if precision == "auto":
        mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if mixed_precision == "no" and has_fast_bf16(device):
            mixed_precision = "bf16"
    if mixed_precision == "fp16" and device == "cpu":  # Accelerate would record it, and compute in float32
        where = "--precision fp16" if precision == "fp16" else "mixed_precision fp16 of the launch configuration"
        raise UserError(f"{where} needs a GPU, and there is none; for a new run give --precision fp32 or bf16")
    try:
        if launch.world_size > 1 and not torch.distributed.is_initialized():
            if device == "cpu":
                choose_gloo_interface()
            launch.wait_for_everyone("starting")  # here, not in C++, where the end of a launcher is not noticed
            torch.distributed.init_process_group(
                torch.distributed.get_default_backend_for_device(device),
                store=torch.distributed.PrefixStore("group", launch.store),
                rank=launch.rank,
                world_size=launch.world_size,
                # NCCL's default of 10 minutes would end a run when one worker's network storage hangs for that long.
                timeout=timedelta(minutes=30),
            )
        AcceleratorState._reset_state()  # an earlier call, as in a notebook, may have had another precision
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=mixed_precision,
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
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes hardly change
    return accelerator


def check_launch(report_to: str | None = None) -> None:
    """Raise UserError if the machine or the configuration of the launch is unsuitable, or there is no such tracker."""
    visible, needed = torch.accelerator.device_count() if device_type() != "cpu" else 0, local_world_size()
    if 0 < visible < needed:  # NCCL's own error would be obscure
        raise UserError(
            f"{needed} processes were launched on this machine, where only {count(visible, 'GPU')} can be seen; set "
            f"num_processes: {visible} in the Accelerate config (or --num_processes {visible}), or show more by "
            "CUDA_VISIBLE_DEVICES or the variable that hides devices of another type"
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):  # `accelerate launch` sets their variables
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"the launch configuration asks for {name}, which divides a model among devices; a ResNet has 12 to 60 "
                "million parameters and fits on one: use distributed_type MULTI_GPU, as in "
                "accelerate_configs/two_gpu.yaml"
            )
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to is not None and report_to not in installed:
        raise UserError(
            f"--report-to {report_to}: unknown to Accelerate, or not installed (pip install {report_to}); installed: "
            f"{', '.join(installed) or 'none'}"
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
