"""Signals to real training processes: saved, status 75, and the resumed run ends as if never interrupted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers.processes import ROOT, TWO_PROCESSES, assert_same_end, at, rank_of, start
from helpers.training import run

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.evaluate import evaluation
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.train import trainer
from resnet_in1k.utils import signals
from resnet_in1k.utils.errors import Preempted

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_stopped_in_training_and_resumed(image_folder: Path, tmp_path: Path, trained_by_one: RunFolder, number):
    folder = RunFolder(tmp_path / "run")
    process = start(image_folder, folder.path)
    _, errors = at(process, "step 6/8", lambda: process.send_signal(number))
    assert process.returncode == 75, errors
    assert errors.startswith(f"stopped by {number.name} after step ")
    assert errors.endswith("resume with the same command and --resume\n")
    assert errors.count("\n") == 1
    assert process.wait() == 75
    out, _ = start(image_folder, folder.path, "--resume").communicate(timeout=120)
    assert "resuming after step " in out
    assert_same_end(folder, trained_by_one)


def test_killed_run_leaves_no_workers(image_folder: Path, tmp_path: Path):
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


def test_second_signal_ends_the_process_at_once():
    """In a process whose main thread is not in Python, as while it waits for another that has hung."""
    code = """
import hashlib, signal
from resnet_in1k.utils import signals
signal.signal(signal.SIGCHLD, lambda *_: None)  # as the DataLoader has one
signals.ECHO_SECONDS = 0.0
with signals.StopSignals():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGCHLD)  # no request at all
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 128 + signal.SIGINT
    finally:
        process.kill()


def test_second_signal_in_a_notebook_interrupts_the_cell(monkeypatch: pytest.MonkeyPatch):
    """To end the process would end the kernel, with all that is in its memory."""
    monkeypatch.setattr(signals, "in_notebook", lambda: True)
    with signals.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.stop_requested(0) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_run_whose_launcher_is_killed_saves_and_ends(image_folder: Path, tmp_path: Path, trained_by_one: RunFolder):
    """`accelerate launch` of one process forwards no signals: the run would go on unnoticed."""
    folder = RunFolder(tmp_path / "run")
    launcher = (
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        "accelerate_configs/one_gpu.yaml",
    )
    process = start(image_folder, folder.path, launcher=launcher)
    _, errors = at(process, "step 2/8", process.terminate)  # all that the run prints, until it ends
    assert process.returncode == -signal.SIGTERM
    assert "stopped by the end of its launcher after step " in errors
    out, _ = start(image_folder, folder.path, "--resume").communicate(timeout=120)
    assert "resuming after step " in out
    assert_same_end(folder, trained_by_one)


def test_stopped_in_validation_and_resumed(
    image_folder: Path, tmp_path: Path, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    """In this process, so that the signal surely comes between two batches of the validation."""

    recipe, _ = read_recipe(finished)
    whole = evaluation.normalize

    def send(images, *how):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(images, *how)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "normalize", send)
        patch.setattr(trainer, "EVAL_BATCH_SIZE", 5)
        with pytest.raises(Preempted, match="stopped by SIGTERM after step 4 of 8"):
            run(recipe, image_folder, folder.path, keep_checkpoints=9)
    assert [record["kind"] for record in folder.records()] == ["train"] * 4
    assert {number: signal.getsignal(number) for number in before} == before
    run(recipe, image_folder, folder.path, keep_checkpoints=9, resume=True)
    assert_same_end(folder, finished)


def test_signal_while_the_data_is_being_opened_is_not_lost(
    tiny: Recipe, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On network storage that may take minutes, and a job that goes back into the queue must end with status 75."""

    def signalled(*how: object) -> tuple[Source, Source]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return open_train_and_val(*how)

    monkeypatch.setattr(trainer, "open_train_and_val", signalled)
    with pytest.raises(Preempted, match="stopped by SIGUSR1 before the first step; start with the same command and"):
        run(tiny, image_folder, tmp_path / "run")
    monkeypatch.undo()
    assert len(run(tiny, image_folder, tmp_path / "run", resume=True).records()) == 10


def test_signal_to_one_of_two_processes_stops_both(image_folder: Path, tmp_path: Path, trained_by_two):
    """To that which does not write; `make torture` signals the other, too."""
    folder = RunFolder(tmp_path / "run")
    process = start(image_folder, folder.path, launcher=TWO_PROCESSES)
    _, errors = at(process, "step 1/8", lambda: rank_of(process, 1).send_signal(signal.SIGUSR1))
    assert errors.count("stopped by SIGUSR1 after step ") >= 1
    again = start(image_folder, folder.path, "--resume", launcher=TWO_PROCESSES)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert "resuming after step " in out
    assert_same_end(folder, trained_by_two[0])
