"""scripts/train.sbatch with stand-ins for srun and scontrol: two tasks on this machine, as on one node or on two."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers.processes import ROOT, SLOW, at

from resnet_in1k.run_folder import RunFolder

SRUN = f"""#!{sys.executable}
import os, subprocess, sys
command = sys.argv[sys.argv.index("bash"):]
num_tasks, num_nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
tasks = []
for rank in range(num_tasks):
    place = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % (num_tasks // num_nodes))}}
    tasks.append(subprocess.Popen(command, env={{**os.environ, **place}}))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then printf "localhost\nother\n"; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks on two nodes."""
    for name, text in [("srun", SRUN), ("scontrol", SCONTROL)]:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }
    here = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued")}
    return {**os.environ, **slurm, **here, "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
def test_stopped_job_is_requeued_and_resumes(cluster: dict[str, str], image_folder: Path, tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    where = ["--data", str(image_folder), "--output-dir", str(folder.path), "--cpu-threads", "1"]
    command = ["bash", "scripts/train.sbatch", *SLOW, "--epochs", "1", *where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, cwd=ROOT, env=cluster, **pipes)

    def signal_all_tasks() -> None:
        for process in psutil.Process(job.pid).children(recursive=True):
            if process.cmdline()[1:2] == ["scripts/train.py"]:  # tasks and their loader workers, as Slurm does
                process.send_signal(signal.SIGUSR1)

    _, errors = at(job, "step 1/4", signal_all_tasks)
    assert job.returncode == 75, errors
    assert Path(cluster["REQUEUED"]).read_text() == "requeue 7\n"

    cluster["SLURM_NNODES"] = "1"  # requeued, both tasks may be on the same node
    again = subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "resuming after step " in again.stdout
    assert "bits will differ" not in again.stdout
    assert Path(cluster["REQUEUED"]).read_text() == "requeue 7\n"  # a finished run is not requeued
    assert [record["step"] for record in folder.records()] == [1, 2, 3, 4, 4]


def test_failed_job_is_not_requeued(cluster: dict[str, str], tmp_path: Path):
    """It ends with the status of its processes, here of a stand-in for train.py."""
    (tmp_path / "python").write_text("#!/usr/bin/env bash\nexit 2\n")
    (tmp_path / "python").chmod(0o755)
    env = {**cluster, "PYTHON": str(tmp_path / "python")}
    assert subprocess.run(["bash", "scripts/train.sbatch"], cwd=ROOT, env=env, timeout=60).returncode == 2
    assert not Path(cluster["REQUEUED"]).exists()
