"""Several machines as real processes on this one: one run, refusals, the death and return of a machine."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers.machines import Machine, two_machines
from helpers.processes import ROOT, SLOW, assert_same_end, free_port

from resnet_in1k.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    with two_machines(tmp_path, free_port()) as pair:
        yield pair


@pytest.mark.parametrize(
    "killed_at", [(), pytest.param((1, 3, 4, 5, 7), marks=pytest.mark.torture)], ids=["whole", "killed_five_times"]
)
def test_two_machines_are_one_run_of_two_processes(machines, image_folder, tmp_path, trained_by_two, killed_at):
    """Also if one of them is killed on the way, with all its processes, and both are started again."""
    folder = RunFolder(tmp_path / "run")
    how = ("--resume", "--checkpoint-every", 2 if killed_at else 1000)
    for step in (*killed_at, None):
        processes = [machine.start(image_folder, folder.path, *how) for machine in machines]
        if step:
            kill_at(processes[0], f"step {step}/8", processes[1])
        outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ("resuming after step 6" in outputs[0][0]) == bool(killed_at)
    assert outputs[0][0].count(" loader worker each; ") == 2  # each machine's cores and memory
    assert outputs[1][0] == ""
    assert_same_end(folder, trained_by_two[0])


def kill_at(process: subprocess.Popen, text: str, victim: subprocess.Popen) -> None:
    """Kill all of another machine's processes once this one has printed the text; none of ours is left then."""
    for line in process.stdout:
        if text in line:
            break
    kill_machine(victim)
    errors = process.stderr.read()
    assert process.wait(60) != 0
    assert "lost its connection to the other processes (" in errors


def kill_machine(launcher: subprocess.Popen) -> None:
    for process in [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_machine_with_other_images_is_refused(machines, image_folder: Path, tmp_path: Path):
    """Both are started by the same command, with paths relative to folders that are not the same."""
    for machine in machines:
        shutil.copytree(image_folder, tmp_path / machine.name / "images")
    (tmp_path / machines[1].name / "images/train/ant/0.jpg").write_bytes(b"another")
    processes = [machine.start("images", "run", cwd=tmp_path / machine.name) for machine in machines]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode != 0 for process in processes)
    for _, errors in outputs:
        message = f"error: {machines[1].name} differs from {machines[0].name}: "
        assert errors.count(message) == 1, errors
    assert "step 1/8" not in outputs[0][0]


def test_lost_machine_ends_in_a_smaller_run(image_folder: Path, tmp_path: Path):
    """torchrun --nnodes 1:2 --max-restarts: the machine that is left goes on alone, with the same global batches."""
    folder, port = RunFolder(tmp_path / "run"), free_port()
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1", "--max-restarts", "3"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"]
    quick = "join_timeout=60,last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    train = ["scripts/train.py", *SLOW, "--data", image_folder, "--output-dir", folder.path, "--resume"]
    processes = [
        subprocess.Popen(
            [sys.executable, *launcher, "--rdzv-conf", f"{quick},is_host={is_host}", *map(str, train)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for is_host in (1, 0)
    ]
    left, lost = processes
    lines = []
    for line in left.stdout:
        lines.append(line)
        if "step 6/8" in line:
            break
    kill_machine(lost)
    lines += left.stdout.readlines()
    printed = "".join(lines)
    assert left.wait(120) == 0, printed
    assert "8 global = 2 processes × 4" in printed
    assert "lost its connection to the other processes (" in printed
    assert "8 global = 1 process × 8" in printed
    assert "resuming after step 4" in printed
    assert [record["step"] for record in folder.records() if record["kind"] == "train"] == list(range(1, 9))
