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
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

from resnet_in1k.utils import device as devices
from resnet_in1k.utils.device import device_type
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count
from resnet_in1k.utils.launch import CONNECT_SECONDS, Launch
from resnet_in1k.utils.process import local_rank, local_world_size
from resnet_in1k.utils.validation import PRECISIONS, PrecisionFlag

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
LAUNCH_SETS = "the launch configuration (its default is printed by `accelerate env`) sets"
LAUNCH_FLAGS = {"DYNAMO_BACKEND": "--compile", "GRADIENT_ACCUMULATION_STEPS": "--gradient-accumulation-steps"}
"""What train.py does itself: its flag, by the end of the variable that `accelerate launch` sets."""


def make_accelerator(
    launch: Launch,
    precision: PrecisionFlag = "auto",
    report_to: str | None = None,
    tracker_folder: Path | None = None,
    compress_gradients: bool = False,
) -> Accelerator:
    """Connect this process with the others of its launch and return its Accelerator.

    Raises UserError if the processes cannot connect, or the launch is unsuitable: see check_launch.
    """
    check_launch(report_to)
    device, mixed_precision = device_type(), choose_precision(precision)
    try:
        if launch.world_size > 1 and not torch.distributed.is_initialized():
            init_process_group(launch, device)
        AcceleratorState._reset_state()  # an earlier call, as in a notebook, may have had another precision
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=mixed_precision,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True,  # saves the memory of a second copy of the gradients
                    comm_hook=DDPCommunicationHookType.BF16 if compress_gradients else DDPCommunicationHookType.NO,
                )
            ],
            log_with=report_to,
            project_dir=tracker_folder,
        )
    except (ValueError, RuntimeError) as error:
        # With all of its text, because the first line of NCCL's does not name the cause.
        raise UserError(f"Accelerate cannot start here: {' '.join(str(error).split())}") from error
    if accelerator.num_processes != launch.world_size:
        raise UserError(
            f"Accelerate finds {accelerator.num_processes} processes where WORLD_SIZE is {launch.world_size}, as under "
            "mpirun; start with accelerate_configs/two_gpu.yaml, which starts processes on CPUs, too, or with torchrun"
        )
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes hardly change
    return accelerator


def init_process_group(launch: Launch, device: str) -> None:
    """Connect the processes of a launch by the device type's own library."""
    own_device = None
    if device == "cpu":
        choose_gloo_interface()
    else:
        own_device = torch.device(device, local_rank())
        torch.accelerator.set_device_index(own_device)
        launch.end_with_others()  # Gloo raises an exception when another process ends
    launch.wait_for_everyone("starting")  # here, not in C++, where the end of a launcher is not noticed
    torch.distributed.init_process_group(
        torch.distributed.get_default_backend_for_device(device),
        store=torch.distributed.PrefixStore("group", launch.store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=CONNECT_SECONDS),
        device_id=own_device,  # so that NCCL connects here, not at the first collective
    )


def choose_precision(precision: PrecisionFlag) -> str:
    """Return Accelerate's name of a precision.

    "auto" is that of the launch configuration. If that is "no", which Accelerate sets for none, too, "auto" is bf16 on
    devices that are fast at it, fp16 on V100 and T4, else fp32. Raises UserError if the device does not compute in it.
    """
    chosen, where = "no" if precision == "fp32" else precision, f"--precision {precision}"
    if precision == "auto":
        chosen = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        where = f"{LAUNCH_SETS} mixed_precision to {chosen}, which"
        if chosen not in PRECISIONS:
            raise UserError(f"{LAUNCH_SETS} mixed_precision to {chosen}; choose one of {', '.join(PRECISIONS)} there")
        chosen = devices.fastest_precision(device_type()) if chosen == "no" else chosen
    if chosen == "fp16" and device_type() == "cpu":  # Accelerate would record it, and compute in float32
        raise UserError(f"{where} needs a GPU, and there is none; for a new run give --precision fp32 or bf16")
    return chosen


def check_launch(report_to: str | None = None) -> None:
    """Raise UserError if the machine or the configuration of the launch is unsuitable, or there is no such tracker."""
    visible, needed = torch.accelerator.device_count() if device_type() != "cpu" else 0, local_world_size()
    if 0 < visible < needed:  # NCCL's own error would be obscure
        raise UserError(
            f"{needed} processes were launched on this machine, where only {count(visible, 'GPU')} can be seen; set "
            f"num_processes: {visible} in the Accelerate config (or --num_processes {visible}), or show more by "
            "CUDA_VISIBLE_DEVICES or the variable that hides devices of another type"
        )
    if driver := unused_driver():
        raise UserError(
            f"torch {torch.__version__} finds no GPU, although this machine has the NVIDIA driver {driver}. If the "
            f"driver is too old for CUDA {torch.version.cuda}, run pip install --force-reinstall torch torchvision "
            "--index-url https://download.pytorch.org/whl/cu126 (nvidia-smi prints the newest CUDA it supports). In a "
            "container or job, ask for a GPU (docker run --gpus all, sbatch --gpus 1). To use the CPU, set "
            "ACCELERATE_USE_CPU=true"
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):  # `accelerate launch` sets their variables
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"the launch configuration asks for {name}, which divides a model among devices; a ResNet has 12 to 60 "
                "million parameters and fits on one: use distributed_type MULTI_GPU, as in "
                "accelerate_configs/two_gpu.yaml"
            )
    for name, flag in LAUNCH_FLAGS.items():
        if (value := os.environ.get(f"ACCELERATE_{name}", "no")).lower() not in ("no", "1"):
            raise UserError(f"{LAUNCH_SETS} {name.lower()} to {value}; remove it there, and give train.py {flag}")
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to is not None and report_to not in installed:
        raise UserError(
            f"--report-to {report_to}: unknown to Accelerate, or not installed (pip install {report_to}); installed: "
            f"{', '.join(installed) or 'none'}"
        )


def unused_driver() -> str:
    """Return the version of an NVIDIA driver whose GPUs torch does not see, although it is built for them and nobody
    has asked for the CPU; else ""."""
    not_wanted = devices.cpu_is_requested() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if not_wanted or not torch.version.cuda or device_type() != "cpu" or not NVIDIA_DRIVER.exists():
        return ""
    words = NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace").split()
    return next((word for word in words if word[0].isdigit() and "." in word), "of unknown version")


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
