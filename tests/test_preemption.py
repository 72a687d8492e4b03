"""Signals to real training processes: saved, status 75, and the resumed run ends as one never interrupted."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from safetensors.torch import load_file
from test_launch import TINY_FLAGS

from resnet_in1k.run_folder import RunFolder, read_recipe

SLOW = [*TINY_FLAGS, "--precision", "fp32", "--workers", "1", "--checkpoint-every", "1000", "--keep-checkpoints", "9"]
"""Eight steps; `at` below sends the signal at one of them."""


def start(data: Path, output: Path, *more: str, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    command = [sys.executable, *launcher, "scripts/train.py", *SLOW, "--data", str(data), "--output-dir", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *more], cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes)


def at(process: "subprocess.Popen[str]", text: str, do: Callable[[], None]) -> tuple[str, str]:
    """Call `do` when a line with `text` has been printed; return all that was said when the process has ended."""
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


@pytest.fixture(scope="module")
def uninterrupted(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    process = start(image_folder, folder.path)
    process.communicate(timeout=120)
    assert process.returncode == 0
    return folder


def essence(folder: RunFolder) -> list[dict]:
    timing = {"images_per_second", "load_seconds", "train_seconds", "val_seconds"}
    return [{key: value for key, value in record.items() if key not in timing} for record in folder.records()]


def assert_same_end(ours: RunFolder, theirs: RunFolder) -> None:
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        last = Path("step_00000008", name)
        assert (ours.checkpoints / last).read_bytes() == (theirs.checkpoints / last).read_bytes(), name
    assert ours.weights.read_bytes() == theirs.weights.read_bytes()
    assert essence(ours) == essence(theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_stopped_in_training_and_resumed(image_folder: Path, tmp_path: Path, uninterrupted: RunFolder, number):
    folder = RunFolder(tmp_path / "run")
    process = start(image_folder, folder.path)
    _, said = at(process, "step 6/8", lambda: process.send_signal(number))
    assert process.returncode == 75, said
    assert said.startswith(f"stopped by {number.name} after step ")
    assert said.endswith("go on with the same command and --resume\n")
    assert said.count("\n") == 1
    assert process.wait() == 75
    out, _ = start(image_folder, folder.path, "--resume").communicate(timeout=120)
    assert "resuming after step " in out
    assert_same_end(folder, uninterrupted)


def test_a_killed_run_leaves_no_workers(image_folder: Path, tmp_path: Path):
    process = start(image_folder, tmp_path / "run")
    children: list[psutil.Process] = []

    def kill() -> None:
        children.extend(psutil.Process(process.pid).children(recursive=True))
        process.kill()

    at(process, "step 3/8", kill)
    assert process.returncode == -signal.SIGKILL
    assert children
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_a_second_signal_ends_at_once(tmp_path: Path):
    """In a process that never looks at the note: it must not need the training loop to end."""
    code = """
import os, signal, time
from accelerate import Accelerator
from resnet_in1k import preemption
preemption.ECHO_SECONDS = 0.0
watch = preemption.Preemption(Accelerator(cpu=True))
os.kill(os.getpid(), signal.SIGTERM)
print(watch.agreed(1), flush=True)
time.sleep(0.01)
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout, result.returncode) == ("SIGTERM\n", 128 + signal.SIGTERM)


def test_stopped_in_validation_and_resumed(
    image_folder: Path, tmp_path: Path, uninterrupted: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    """In this process, so that the signal surely comes between two batches of the validation."""
    from test_training import run

    from resnet_in1k import evaluation
    from resnet_in1k.errors import Preempted

    recipe, _ = read_recipe(uninterrupted)
    whole = evaluation.normalise

    def send(images):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(images)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    folder = RunFolder(tmp_path / "run")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "normalise", send)
            patch.setattr(evaluation.evaluate_model, "__kwdefaults__", {
                **evaluation.evaluate_model.__kwdefaults__, "batch_size": 5
            })  # fmt: skip
            with pytest.raises(Preempted, match="stopped by SIGTERM after step 4 of 8"):
                run(recipe, image_folder, folder.path, keep_checkpoints=9)
        assert [record["kind"] for record in folder.records()] == ["train"] * 4
        run(recipe, image_folder, folder.path, keep_checkpoints=9, resume=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert_same_end(folder, uninterrupted)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_either_of_two_processes_stops_both(image_folder: Path, tmp_path: Path, rank: int):
    folder = RunFolder(tmp_path / "run")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    process = start(image_folder, folder.path, launcher=launcher)

    def send() -> None:
        ranks = [child for child in psutil.Process(process.pid).children() if "scripts/train.py" in child.cmdline()]
        (chosen,) = [child for child in ranks if child.environ()["RANK"] == str(rank)]
        chosen.send_signal(signal.SIGUSR1)

    _, said = at(process, "step 1/8", send)
    assert said.count("stopped by SIGUSR1 after step ") >= 1
    (step,) = [path for path in folder.checkpoints.iterdir() if path.name.startswith("step_")][-1:]
    assert load_file(step / "model.safetensors")
    again = start(image_folder, folder.path, "--resume", launcher=launcher)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert "resuming after step " in out
    assert [record["step"] for record in folder.records() if record["kind"] == "train"] == list(range(1, 9))
