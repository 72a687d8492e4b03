"""Fixtures that several tests share: real photographs, folders of images, trained runs, scripts run as a user would."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported: idle threads of libgomp spin briefly, as the tests are more processes than there are cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "300")

import numpy as np
import pytest
import torch
from helpers import emulated_accelerator
from helpers.hub_server import HubServer
from helpers.images import write_image_folder
from helpers.processes import ROOT, SLOW, accelerate_launch, start
from helpers.training import TINY, reset_accelerate_state, run
from sklearn.datasets import load_sample_images

from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.cli.export import ExportOptions, export
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.device import usable_cores

# Of listings, and of `datasets`, which makes copies of all tables that it reads.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")
os.environ["HF_DATASETS_CACHE"] = os.environ["XDG_CACHE_HOME"]

emulated_accelerator.register()

LONGEST = ("test_machines", "test_faults", "test_signals", "test_torture", "test_launch", "test_upload", "test_loop")
"""These files first, so that no worker is left with one of them when the others have finished."""


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--torture", action="store_true", help="kill and signal training processes at length (up to an hour)"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What this process may use, not what the machine has: of its 64 cores a container may have two."""
    return usable_cores()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--torture"):
        items[:] = [item for item in items if "torture" not in item.keywords]
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Two real photographs, (427, 640, 3) uint8, that come with scikit-learn."""
    return [image.copy() for image in load_sample_images().images]


@pytest.fixture(scope="session")
def image_folder(photographs: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 training and 12 validation images in six classes: sizes that nothing divides."""
    classes = {"ant": 7, "bee": 6, "cat": 6, "dog": 6, "eel": 6, "fox": 6}
    return write_image_folder(tmp_path_factory.mktemp("images"), photographs, classes)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A local Hub, used by the client in this process, from a folder without files."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's attempts
    with HubServer() as server:
        server.patch_client(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def tiny() -> Recipe:
    return TINY


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """Accelerate keeps its first answers for the whole process; each test asks anew."""
    reset_accelerate_state()


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
ALLOWED_CORES = sorted(os.sched_getaffinity(0))

if NUM_WORKERS > 1:
    # Each its share of the cores, which the processes it starts inherit: trainings that each use all cores slow one
    # another down many times.
    os.sched_setaffinity(0, ALLOWED_CORES[WORKER % len(ALLOWED_CORES) :: NUM_WORKERS])
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # more threads than cores wait for one another, spinning


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For one test, not this worker's share only."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALLOWED_CORES)
    yield
    os.sched_setaffinity(0, ours)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run_script() -> Run:
    """Run a script by its path as a user would, from the repository's root; `config` launches it by Accelerate."""

    def run(*arguments: object, config: str | None = None, env: dict[str, str] | None = None) -> object:
        launcher = accelerate_launch(config) if config else ()
        command = [sys.executable, *launcher, *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})}
        )

    return run


@pytest.fixture(scope="session")
def trained_by_one(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """TINY by one process that nobody interrupted."""
    folder = RunFolder(tmp_path_factory.mktemp("one") / "run")
    process = start(image_folder, folder.path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


@pytest.fixture(scope="session")
def trained_by_two(
    run_script: Run, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, str]:
    """TINY by two processes on this machine's CPU; and what they printed."""
    output = tmp_path_factory.mktemp("two") / "run"
    how = ("--data", image_folder, "--output-dir", output)
    result = run_script("scripts/train.py", *SLOW, *how, config="two_gpu.yaml")
    assert result.returncode == 0, result.stderr
    return RunFolder(output), result.stdout


@pytest.fixture(scope="session")
def finished(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """TINY on 37 images, in this process: two epochs of four steps."""
    return run(TINY, image_folder, tmp_path_factory.mktemp("run") / "finished", checkpoint_every=3, keep_checkpoints=9)


@pytest.fixture(scope="session")
def exported(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A copy of the run with its network in both formats, and their evaluations."""
    reset_accelerate_state()
    folder = tmp_path_factory.mktemp("exported") / "run"
    run = RunFolder(Path(shutil.copytree(finished.path, folder, ignore=shutil.ignore_patterns("checkpoints"))))
    for format, tolerance in (("onnx", 1e-4), ("pt2", 0)):
        network = run.path / f"model.{format}"
        assert export(ExportOptions(ckpt=str(run.path), format=format, output=network)) <= tolerance
        output = run.path / f"eval.{format}.json"
        evaluate(EvalOptions(ckpt=str(network), workers=0, batch_size=5, output=output))
    return run
