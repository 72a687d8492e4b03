"""Signals to real training processes: saved, status 75, and the resumed run ends as if never interrupted."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from helpers.processes import ROOT, SLOW, TWO_PROCESSES, accelerate_launch, assert_same_end, at, rank_of, start
from helpers.training import losses, run

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.evaluate import evaluation
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.train import trainer
from resnet_in1k.utils import signals
from resnet_in1k.utils.device import usable_cores
from resnet_in1k.utils.errors import Preempted
from resnet_in1k.utils.launch import Launch

pytestmark = pytest.mark.slow


def test_stopped_in_training_and_resumed(image_folder: Path, tmp_path: Path, trained_by_one: RunFolder):
    folder = RunFolder(tmp_path / "run")
    process = start(image_folder, folder.path)
    _, errors = at(process, "step 6/8", process.terminate)
    assert process.returncode == 75, errors
    assert errors.startswith("stopped by SIGTERM after step ")
    assert errors.endswith("resume with the same command and --resume\n")
    assert errors.count("\n") == 1
    out, _ = start(image_folder, folder.path, "--resume").communicate(timeout=120)
    assert "resuming after step " in out
    assert_same_end(folder, trained_by_one)


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
        assert stop.stop_requested(Launch(), 0) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_run_whose_launcher_is_killed_saves_and_ends(image_folder: Path, tmp_path: Path, all_cores, monkeypatch):
    """`accelerate launch` of one process forwards no signals: the run would go on unnoticed. And it sets
    OMP_NUM_THREADS=1 where its configuration has no other value: the run uses all physical cores all the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = start(image_folder, tmp_path / "run", launcher=accelerate_launch("one_gpu.yaml"))
    out, errors = at(process, "step 2/8", process.terminate)  # all that the run prints, until it ends
    assert f"{usable_cores()} CPU thread" in out
    assert process.returncode == -signal.SIGTERM
    (step,) = re.findall(r"^stopped by the end of its launcher after step (\d) of 8", errors, re.M)
    assert int(step) < 8
    assert (tmp_path / f"run/checkpoints/step_0000000{step}").is_dir()


def test_run_whose_terminal_is_lost_saves_and_ends(image_folder: Path, tmp_path: Path):
    """As by a broken SSH connection: what the run prints from then on has nowhere to go."""
    terminal, ours = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "scripts/train.py", *SLOW, "--data", str(image_folder), "--output-dir", str(tmp_path / "run")],
        cwd=ROOT,
        stdin=ours,
        stdout=ours,
        stderr=ours,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(ours)
    with open(terminal, encoding="utf-8", newline="\n") as lines:
        next(line for line in lines if "step 2/8" in line)
    assert process.wait(120) == 75
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert checkpoint.name < "step_00000008"


def test_a_line_that_is_printed_before_the_signal_arrives_is_no_error():
    """The terminal is lost, and there is no SIGHUP yet; the bar and the line are on it."""
    code = (
        "from resnet_in1k.utils.console import bar_below_lines, print_line; input(); bar = bar_below_lines(9, 'train');"
        "print_line('lost'); bar.refresh(); bar.close(); print_line('lost')"
    )
    terminal, ours = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=ours, stderr=ours, start_new_session=True
    )
    os.close(ours)
    os.close(terminal)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0


@pytest.mark.usefixtures("narrow")
def test_stopped_in_validation_and_resumed(
    image_folder: Path, tmp_path: Path, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    """In this process, so that the signal surely comes between two batches of the validation."""

    recipe, _ = read_recipe(finished)
    whole = evaluation.normalize

    def send(images, *how):
        os.kill(os.getpid(), signal.SIGINT)
        return whole(images, *how)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "normalize", send)
        patch.setattr(trainer, "EVAL_BATCH_SIZE", 5)
        with pytest.raises(Preempted, match="stopped by SIGINT after step 4 of 8"):
            run(recipe, image_folder, folder.path, keep_checkpoints=9)
    assert [record["kind"] for record in folder.records()] == ["train"] * 4
    assert {number: signal.getsignal(number) for number in before} == before
    run(recipe, image_folder, folder.path, keep_checkpoints=9, resume=True)
    assert_same_end(folder, finished)


@pytest.mark.usefixtures("narrow")
def test_signal_while_the_data_is_being_opened_is_not_lost(
    tiny: Recipe, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On network storage that may take minutes, and a job that goes back into the queue must end with status 75."""

    def signalled(*how: object) -> tuple[Source, Source]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return open_train_and_val(*how)

    monkeypatch.setattr(trainer, "open_train_and_val", signalled)
    with pytest.raises(Preempted, match="stopped by SIGUSR1 before training started, everything is saved"):
        run(tiny, image_folder, tmp_path / "run")
    monkeypatch.undo()
    assert len(run(tiny, image_folder, tmp_path / "run", resume=True).records()) == 10


def test_signal_to_one_of_two_processes_stops_both_and_one_goes_on(
    tiny: Recipe, image_folder: Path, tmp_path: Path, trained_by_two
):
    """To that which does not write. Two halves on two processes are two accumulation steps on one: the same images,
    norms and gradients. `make torture` signals the other, too."""
    folder = RunFolder(tmp_path / "run")
    process = start(image_folder, folder.path, launcher=TWO_PROCESSES)
    _, errors = at(process, "step 1/8", lambda: rank_of(process, 1).send_signal(signal.SIGUSR1))
    assert errors.count("stopped by SIGUSR1 after step ") >= 1
    stopped_after = len(losses(folder))
    assert stopped_after < 8
    run(tiny, image_folder, folder.path, resume=True, gradient_accumulation_steps=2)
    ours, theirs = losses(folder), losses(trained_by_two[0])
    assert len(ours) == len(theirs) == 8
    assert ours[:stopped_after] == theirs[:stopped_after]
    same = slice(stopped_after, stopped_after + 3)
    assert ours[same] == pytest.approx(theirs[same], rel=1e-4)  # rounding grows tenfold a step in so small a network
