import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers.processes import ROOT

from resnet_in1k.core import distributed, files
from resnet_in1k.core.errors import ProcessError, UserError

LOST = r"^process 3 has lost the others \({}\): one of them has ended, .* go on with --resume$"
CANNOT_COMMUNICATE = r"^process 3 cannot communicate with the others: {}; NCCL_DEBUG=INFO says more, .*/dev/shm"


def test_unrelated_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    """A launch of two in which Accelerate sees only one: each would train alone and write over the other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: SimpleNamespace(num_processes=1, log_with=[]))
    with pytest.raises(UserError, match="2 processes were launched, but this one sees 1"):
        distributed.make_accelerator()


def test_too_few_gpus_are_refused_before_the_processes_connect(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "Accelerator", None)
    with pytest.raises(UserError, match="only 1 GPU is visible"):
        distributed.make_accelerator()


def test_failed_start_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: object) -> None:
        raise RuntimeError("The server socket has failed to listen\nmore")

    monkeypatch.setattr(distributed, "Accelerator", refuse)
    with pytest.raises(UserError, match=r"^Accelerate cannot start here: The server socket has failed to listen$"):
        distributed.make_accelerator("fp32")


@pytest.mark.parametrize(
    ("launched", "asked", "fast", "expected"),
    [
        ("no", "auto", True, "bf16"),
        ("no", "auto", False, "no"),
        ("fp16", "auto", True, "fp16"),
        ("bf16", "auto", False, "bf16"),
        ("bf16", "fp32", True, "no"),
        ("no", "fp16", True, "fp16"),
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
    monkeypatch.setattr(distributed, "has_fast_bf16", lambda device: fast)
    if launched is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    distributed.make_accelerator(asked)
    assert chosen["mixed_precision"] == expected


def test_accumulation_of_the_launch_does_not_divide_the_loss(monkeypatch: pytest.MonkeyPatch):
    """Accelerate's backward divides by its own number of accumulation steps; the step divides already."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert Accelerator(cpu=True).gradient_accumulation_steps == 4  # it reads the variable
    weight = torch.ones((), requires_grad=True)
    distributed.make_accelerator("fp32").backward(3 * weight)
    assert weight.grad == 3


@pytest.mark.parametrize(("name", "message"), [("abacus", "unknown tracker.*tensorboard"), ("wandb", "not installed")])
def test_tracker_that_cannot_report_is_refused(name: str, message: str):
    with pytest.raises(UserError, match=f"--report-to {name}: {message}"):
        distributed.make_accelerator("fp32", report_to=name)


def test_failed_write_ends_with_advice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "RETRY_AFTER_SECONDS", 0)
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1)

    def write() -> None:
        raise OSError(28, "No space left on device", "run/log.jsonl")

    words = r"^run/log\.jsonl cannot be written: No space left on device; what was saved before is intact: .*--resume$"
    with pytest.raises(UserError, match=words):
        distributed.on_main_process(accelerator, write)
    with pytest.raises(UserError, match=r"No space left on device, so there$"):
        distributed.on_main_process(accelerator, write, advice=", so there")

    errors = [OSError(5, "Input/output error")]
    distributed.on_main_process(accelerator, lambda: (_ for _ in ()).throw(errors.pop()) if errors else None)
    assert errors == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"),
            r"Connection closed by peer \[127\.0\.0\.1\]:4711",
        ),
        (RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms"), "Timed out .*ms"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:2] Read error [::1]:1: Connection reset by peer"), "Read .* peer"),
        (
            torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error\nmore"),
            "NCCL error: remote process exited or there was a network error",
        ),
    ],
)
def test_lost_process_is_explained(monkeypatch: pytest.MonkeyPatch, error: RuntimeError, reason: str):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ProcessError, match=LOST.format(reason)), distributed.lost_processes_explained():
        raise error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.distributed.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:94, unhandled system error\nLast error:\n"
                "Error while creating shared memory segment /dev/shm/nccl-1 (size 9637888)"
            ),
            r"NCCL error in: .* unhandled system error Last error: Error while creating .* \(size 9637888\)",
        ),
        (RuntimeError("[/gloo/transport/tcp/device.cc:84] Unable to find interface for: eth7"), r"\[/gloo.* eth7"),
        (torch.distributed.DistNetworkError("Connection refused"), "Connection refused"),
    ],
)
def test_other_failure_of_communication_keeps_its_reason(monkeypatch, error: RuntimeError, reason: str):
    """In one line, with all that the library says: nobody has ended."""
    monkeypatch.setenv("RANK", "3")
    with (
        pytest.raises(ProcessError, match=CANNOT_COMMUNICATE.format(reason)) as raised,
        distributed.lost_processes_explained(),
    ):
        raise error
    assert "\n" not in str(raised.value)


def test_error_of_another_kind_is_not_explained():
    with pytest.raises(RuntimeError, match=r"^Timed out in user code$"), distributed.lost_processes_explained():
        raise RuntimeError("Timed out in user code")


PROCESS = """
import torch
from resnet_in1k.core import distributed
from resnet_in1k.core.errors import ProcessError, UserError

accelerator = distributed.make_accelerator("fp32")
rank = accelerator.process_index

norm = torch.nn.BatchNorm1d(2)
norm.running_mean += rank + 1
distributed.broadcast_buffers(norm, accelerator)
print(norm.running_mean.tolist())

def write():
    print("writes")
    raise OSError(28, "No space left on device", "file")

try:
    distributed.on_main_process(accelerator, write)
except UserError as error:
    print(str(error).split(";")[0])

if rank == 0:  # the other process has ended
    try:
        with distributed.lost_processes_explained():
            for _ in range(2):
                torch.distributed.all_reduce(torch.ones(1))
    except ProcessError as error:
        print(error)
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    """They share buffers and the failure of a write; and one reports that the other has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    main, other = (process.communicate(timeout=120)[0].splitlines() for process in processes)
    failure = "file cannot be written: No space left on device"
    assert main[:3] == ["[1.0, 1.0]", "writes", failure]
    assert other == ["[1.0, 1.0]", failure]
    assert main[3].startswith("process 0 has lost the others (")
