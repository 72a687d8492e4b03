"""Training in separate processes, as a user starts it: started, signalled, killed, compared."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from resnet_in1k.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]

TINY_FIELDS = {
    "model": "resnet18",
    "epochs": 2,
    "global_batch_size": 8,
    "image_size": 32,
    "eval_crop_ratio": 0.875,
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "lr_batch_rule": "linear",
    "lr": 0.002,  # so small a network amplifies rounding from step to step; a small step less so
    "warmup_epochs": 1,
    "hflip_probability": 0.5,
}
"""What the recipe `helpers.training.TINY` has unlike `demo`: with every augmentation but hue."""
SLOW = [
    *("--recipe", "demo", "--precision", "fp32", "--workers", "1", "--log-every", "1"),
    *("--checkpoint-every", "1000", "--keep-checkpoints", "9"),
    *(f"--{name.replace('_', '-')}={value}" for name, value in TINY_FIELDS.items()),
]
"""TINY by flags: eight steps, each of them logged."""
TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc_per_node", "2")


def accelerate_launch(config: str) -> tuple[str, ...]:
    """The accelerate command of this very environment; at any port, as another test's launch may have the usual one."""
    command = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", f"accelerate_configs/{config}")
    return (*command, "--main_process_port", "0")


def start(data: object, output: Path, *more: str, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    command = [sys.executable, *launcher, "scripts/train.py", *SLOW, "--data", str(data), "--output-dir", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *more], cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes)


def at(process: "subprocess.Popen[str]", text: str, do: Callable[[], None]) -> tuple[str, str]:
    """Call `do` when a line with `text` is printed; return standard output and error once the process has ended."""
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            do()
    process.wait(timeout=120)
    reader.join()
    return "".join(lines), errors[0]


def rank_of(launcher: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    """The training process of that rank, or the only one there is."""
    for child in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a loader worker that has just ended
            if "scripts/train.py" in child.cmdline() and child.environ().get("RANK") == str(rank):
                return child
    return psutil.Process(launcher.pid)


def log_without_times(folder: RunFolder) -> list[dict]:
    """The log, except for what a clock measured."""
    timing = {"images_per_second", "load_seconds", "train_seconds", "val_seconds"}
    return [{key: value for key, value in record.items() if key not in timing} for record in folder.records()]


def assert_same_end(ours: RunFolder, theirs: RunFolder) -> None:
    """Last checkpoint, best weights, eval.json, log and curves are the same, bit for bit."""
    (last, last_of_theirs) = (sorted(folder.checkpoints.glob("step_*"))[-1] for folder in (ours, theirs))
    assert last.name == last_of_theirs.name
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (last / name).read_bytes() == (last_of_theirs / name).read_bytes(), name
    for name in ("model.safetensors", "eval.json", "curves.svg", "curves.png"):
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes(), name
    assert log_without_times(ours) == log_without_times(theirs)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
