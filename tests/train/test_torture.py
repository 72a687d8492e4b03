"""Killed at any moment and resumed, a run ends as if never interrupted; also when stopped by signals.

The suite runs a few cases, and kills one of two machines in test_machines.py; `make torture` runs all of them, and
prints where each kill fell.
"""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.processes import TWO_PROCESSES, assert_same_end, at, rank_of, start

from resnet_in1k.run_folder import RunFolder

pytestmark = pytest.mark.slow


EVERY_STEP = ("--checkpoint-every", "1", "--keep-checkpoints", "2", "--resume")
MOMENTS = ("checkpoint", "validation", "any")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
IN_CHECKPOINT, IN_VALIDATION = ", in a checkpoint", ", in or just before the validation"


def last_record(folder: RunFolder) -> dict:
    records = folder.records()
    return records[-1] if records else {"kind": "none", "step": 0}


def holder(folder: RunFolder) -> str:
    """The process id of the run that has the folder, or had it last."""
    lock = folder.path / ".lock"
    words = lock.read_text().split() if lock.exists() else []
    return words[1] if len(words) > 1 else ""


def half_written(folder: RunFolder, process_id: str = "") -> list[Path]:
    return [path for path in folder.checkpoints.glob(".step_*") if process_id in path.name]


def moment(kind: str, folder: RunFolder, whole_seconds: float, draw: random.Random) -> tuple[Callable[[], bool], float]:
    """What to wait for, once the run has started, and how long at most from there to the kill."""
    step = draw.randint(1, 8)
    if kind == "checkpoint":
        return lambda: last_record(folder)["step"] >= step and bool(half_written(folder, holder(folder))), 0.3
    if kind == "validation":
        epoch_end = draw.choice([4, 8])
        return lambda: last_record(folder)["step"] >= epoch_end and last_record(folder)["kind"] == "train", 0.5
    return lambda: True, whole_seconds


def train_until_killed(
    data: Path, folder: RunFolder, rank: int, launcher: tuple[str, ...], happened: Callable[[], bool], delay: float
) -> str:
    """Start or resume, kill -9 that rank `delay` after it has happened; return where, or "" if the run was over."""
    before = holder(folder)
    process = start(data, folder.path, *EVERY_STEP, launcher=launcher)
    try:
        # The files of the run before must not be taken for this one's.
        while process.poll() is None and not (
            holder(folder) not in ("", before) and folder.log.exists() and happened()
        ):
            time.sleep(0.002)
        try:
            assert process.wait(delay) == 0
            return ""
        except subprocess.TimeoutExpired:
            victim = rank_of(process, rank)
            workers = victim.children(recursive=True)
            victim.kill()
        last, ours = last_record(folder), half_written(folder, holder(folder))
        where = f"after step {last['step']}"
        if last["step"] in (4, 8) and last["kind"] == "train" and not ours:
            where += IN_VALIDATION
        killed_seconds = time.monotonic()
        _, errors = process.communicate(timeout=90)
        assert workers or not ours
        assert psutil.wait_procs(workers, timeout=20)[1] == [], "workers outlived their process"
        if launcher:
            assert time.monotonic() - killed_seconds < 60
            assert "Signal 9 (SIGKILL) received by PID" in errors
        return where + (IN_CHECKPOINT if ours else "")
    finally:
        process.kill()


kills: list[str] = []
"""Where each fell."""


def torture(data: Path, folder: RunFolder, reference: RunFolder, number: int, launcher: tuple[str, ...] = ()) -> None:
    """Kill a run once, or three times in the long tests of one process; then let it end."""
    draw, before = random.Random(number), len(kills)
    whole_seconds = reference.evaluation.stat().st_mtime - reference.recipe.stat().st_mtime
    for kill in range(3 if number and not launcher else 1):
        kind = MOMENTS[(number + kill) % len(MOMENTS)]
        happened, at_most = moment(kind, folder, whole_seconds, draw)
        where = train_until_killed(data, folder, draw.randint(0, 1), launcher, happened, draw.uniform(0, at_most))
        print(f"run {number}, kill {kill} ({kind}): {where or 'the run was over'}")
        kills.extend([where] if where else [])
    assert len(kills) > before, "the run was never killed"
    process = start(data, folder.path, *EVERY_STEP, launcher=launcher)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert half_written(folder) == []
    assert_same_end(folder, reference)


@pytest.mark.parametrize("number", [0, *(pytest.param(each, marks=pytest.mark.torture) for each in range(1, 25))])
def test_killed_and_resumed_run_ends_alike(image_folder: Path, tmp_path: Path, trained_by_one, number: int):
    torture(image_folder, RunFolder(tmp_path / "run"), trained_by_one, number)


@pytest.mark.torture
@pytest.mark.parametrize("number", range(5))
def test_run_with_one_of_two_processes_killed_ends_alike(image_folder, tmp_path: Path, trained_by_two, number: int):
    torture(image_folder, RunFolder(tmp_path / "run"), trained_by_two[0], number, TWO_PROCESSES)


@pytest.mark.torture
def test_kills_hit_all_phases():
    """After those above: a harness that looks for the wrong signs would kill at random, and find less."""
    in_checkpoint, in_validation = (sum(place in where for where in kills) for place in (IN_CHECKPOINT, IN_VALIDATION))
    print(f"{len(kills)} kills: {in_checkpoint} in a checkpoint, {in_validation} in or just before a validation")
    assert min(in_checkpoint, in_validation) >= 5


@pytest.mark.torture
@pytest.mark.parametrize(("num_processes", "rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("moment", ["step 2/8", "step 4/8"], ids=["training", "validation"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_stops_the_run_within_ten_seconds(
    image_folder, tmp_path: Path, trained_by_one, trained_by_two, number, moment: str, num_processes: int, rank: int
):
    folder, launcher = RunFolder(tmp_path / "run"), TWO_PROCESSES if num_processes == 2 else ()
    process = start(image_folder, folder.path, launcher=launcher)
    sent_seconds: list[float] = []

    def send() -> None:
        rank_of(process, rank).send_signal(number)
        sent_seconds.append(time.monotonic())

    _, errors = at(process, moment, send)
    elapsed_seconds = time.monotonic() - sent_seconds[0]
    print(f"{number.name} at {moment} to process {rank} of {num_processes}: ended after {elapsed_seconds:.1f} s")
    assert process.returncode == 75 or num_processes > 1
    assert f"stopped by {number.name} after step " in errors
    assert elapsed_seconds < 10
    again = start(image_folder, folder.path, "--resume", launcher=launcher)
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert_same_end(folder, trained_by_one if num_processes == 1 else trained_by_two[0])
