import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from helpers.two_processes import run_two

from resnet_in1k.utils import device as devices
from resnet_in1k.utils import distributed
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch


@pytest.mark.parametrize(
    ("launched", "asked", "fast", "expected"),
    [
        ("no", "auto", True, "bf16"),
        ("no", "auto", False, "no"),
        ("bf16", "auto", False, "bf16"),
        ("bf16", "fp32", True, "no"),
        (None, "auto", True, "bf16"),
    ],
)
def test_precision_follows_the_launch_then_the_device(monkeypatch, launched, asked, fast, expected):
    chosen = {}

    class Recorder:
        num_processes, device, log_with = 1, torch.device("cpu"), ()

        def __init__(self, **how: object):
            chosen.update(how)

    monkeypatch.setattr(distributed, "Accelerator", Recorder)
    monkeypatch.setattr(devices, "fastest_precision", lambda device: "bf16" if fast else "no")
    if launched is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    distributed.make_accelerator(Launch(), asked)
    assert chosen["mixed_precision"] == expected


@pytest.mark.parametrize(("launched", "asked"), [("no", "fp16"), ("fp16", "auto")])
def test_fp16_is_refused_on_a_cpu_where_float32_would_be_computed(monkeypatch, launched: str, asked: str):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(UserError, match=r"fp16.* needs a GPU, and there is none; for a new run give --precision fp32"):
        distributed.make_accelerator(Launch(), asked)
    weight = torch.ones(1, 1)
    for given, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):  # the advice
        with distributed.make_accelerator(Launch(), given).autocast():
            assert (weight @ weight).dtype == dtype


def test_one_process_may_train_and_then_evaluate_in_another_precision():
    """As a notebook does; Accelerate itself refuses a second precision."""
    assert [distributed.make_accelerator(Launch(), asked).mixed_precision for asked in ("bf16", "fp32")] == [
        "bf16",
        "no",
    ]


CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
num_processes: 1
use_cpu: true
"""
SETTINGS = {
    "dynamo": ("dynamo_config: {dynamo_backend: INDUCTOR}", "dynamo_backend to INDUCTOR; .* give train.py --compile"),
    "fp8": ("mixed_precision: fp8", "mixed_precision to fp8; choose one of no, bf16, fp16 there"),
}


def launch_by(configuration: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables that `accelerate launch` sets by a configuration file."""
    monkeypatch.setattr("accelerate.utils.launch.is_fp8_available", lambda: True)
    file = folder / "default_config.yaml"
    file.write_text(configuration)
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "scripts/train.py"])
    _, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(arguments)[0])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_forgotten_configuration_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Without the setting, as the message advises, the launch is accepted."""
    setting, words = SETTINGS[name]
    launch_by(CONFIGURATION + setting, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=rf"^the launch configuration \(.*accelerate env.*\) sets {words}$"):
        distributed.make_accelerator(Launch())
    launch_by(CONFIGURATION, tmp_path, monkeypatch)
    distributed.make_accelerator(Launch())


def test_accumulation_of_the_launch_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Accelerate's backward would divide by its own number of accumulation steps; the step divides already."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert Accelerator(cpu=True).gradient_accumulation_steps == 4  # it reads the variable
    with pytest.raises(UserError, match=r"sets gradient_accumulation_steps to 4; .* --gradient-accumulation-steps"):
        distributed.make_accelerator(Launch(), "fp32")


def test_processes_that_only_accelerate_has_found_are_refused(monkeypatch: pytest.MonkeyPatch):
    """As under mpirun: each would believe to be alone, and write to the same folder."""
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(UserError, match=r"finds 2 processes where WORLD_SIZE is 1, as under mpirun"):
        distributed.make_accelerator(Launch(), "fp32")


def test_too_few_devices_are_refused_with_their_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(distributed, "device_type", lambda: "mps")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    distributed.check_launch()
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^4 processes .* only 2 GPUs can be seen; set num_processes: 2 "):
        distributed.check_launch()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_launch_that_divides_the_model_is_refused(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=rf"^the launch configuration asks for {name}, .*: use .* MULTI_GPU"):
        distributed.make_accelerator(Launch(), "fp32")


def test_gloo_takes_the_interface_that_leads_to_the_main_process(monkeypatch: pytest.MonkeyPatch):
    """Where the host's name resolves to 127.0.1.1, it would by itself listen where no other machine can connect."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is restored afterwards
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    distributed.choose_gloo_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    distributed.choose_gloo_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.parametrize("name", ["abacus", "wandb"])
def test_tracker_that_cannot_report_is_refused(name: str):
    words = rf"--report-to {name}: unknown .*\(pip install {name}\); installed: tensorboard"
    with pytest.raises(UserError, match=words):
        distributed.make_accelerator(Launch(), "fp32", report_to=name)


PROCESS = """
import torch
from dataclasses import replace
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.train.step import TrainStep
from resnet_in1k.utils import device as devices
from resnet_in1k.utils import distributed
from resnet_in1k.utils.errors import ProcessError, translate_errors
from resnet_in1k.utils.launch import Launch

launch = Launch.connect()
recipe = replace(RECIPES["demo"].recipe, model="resnet18", image_size=32, momentum=0.0, weight_decay=0.0)
images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(launch.rank))

def trained(compress_gradients):
    accelerator = distributed.make_accelerator(launch, "fp32", compress_gradients=compress_gradients)
    step = TrainStep(recipe, 10, accelerator)
    before = step.model.fc.weight.detach().clone()
    for _ in range(2):
        step(images, torch.arange(4), 0.01, 1)
    return step.model.fc.weight - before

exact, compressed = trained(False), trained(True)
print(exact.norm().item(), bool(0 < (exact - compressed).norm() / exact.norm() < 0.02))

if launch.is_main_process:  # the other process has ended
    try:
        with translate_errors():
            for _ in range(2):
                torch.distributed.all_reduce(torch.ones(1))
    except ProcessError as error:
        print(error)
"""


@pytest.mark.slow
def test_two_processes_send_gradients_and_report_that_one_has_ended():
    """They take the same steps, nearly the same with compressed gradients, and report that the other has ended."""
    main, other = (printed.splitlines() for printed in run_two("-c", PROCESS))
    assert main[0] == other[0]
    assert main[0].endswith(" True")
    assert main[1].startswith("process 0 lost its connection to the other processes (")
