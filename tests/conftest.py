"""What several tests share: real photographs, folders of images, and the scripts run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, TINY_FLAGS, start
from sklearn.datasets import load_sample_images

from resnet_in1k.devices import usable_cores
from resnet_in1k.recipes import DEMO, Recipe
from resnet_in1k.run_folder import RunFolder

TINY = replace(
    DEMO,
    model="resnet18",
    epochs=2,
    global_batch_size=8,
    lr=0.002,  # so small a network amplifies rounding from step to step; a small step less so
    image_size=32,
    eval_crop_ratio=0.875,
    hflip_probability=0.5,
)
"""A recipe small enough for tests, with every augmentation but hue."""


LONG = ("test_torture", "test_training", "test_preemption", "test_push", "test_launch", "test_faults")
"""These files first, so that no worker is left with one of them when the others have finished."""


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
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    at_length = metafunc.config.getoption("--torture")
    for name, num_short, num_long in [("torture_number", 1, 25), ("torture_number_of_two", 1, 5)]:
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, range(num_long if at_length else num_short))


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Two real photographs, (427, 640, 3) uint8, that come with scikit-learn."""
    return [image.copy() for image in load_sample_images().images]


def write_image_folder(root: Path, photographs: list[np.ndarray], classes: dict[str, int]) -> Path:
    """`root/{train,val}/<class>/<number>.jpg`: so many images in train, a third (at least 1) in val; all differ."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count if split == "train" else max(1, count // 3)):
                height, width = generator.integers(40, 90, 2)
                top, left = generator.integers(0, 300, 2)
                photograph = photographs[generator.integers(len(photographs))]
                crop = photograph[top : top + height, left : left + width]
                Image.fromarray(crop).save(folder / f"{number}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def image_folder(photographs: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 training and 12 validation images in six classes: sizes that nothing divides."""
    classes = {"ant": 7, "bee": 6, "cat": 6, "dog": 6, "eel": 6, "fox": 6}
    return write_image_folder(tmp_path_factory.mktemp("images"), photographs, classes)


@pytest.fixture
def tiny() -> Recipe:
    return TINY


def forget_accelerate_state() -> None:
    """Accelerate remembers its first answers for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """Each test asks anew."""
    forget_accelerate_state()


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
ALLOWED_CORES = sorted(os.sched_getaffinity(0))

if NUM_WORKERS > 1:
    # Each its share of the cores, which all that it starts inherits: trainings that think they have the machine to
    # themselves hold one another up many times longer than they run.
    os.sched_setaffinity(0, ALLOWED_CORES[WORKER % len(ALLOWED_CORES) :: NUM_WORKERS])


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Not this worker's alone, for once."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALLOWED_CORES)
    yield
    os.sched_setaffinity(0, ours)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run_script() -> Run:
    """Run a script by its path as a user would, from the repository's root; `config` launches it by Accelerate."""

    def run(*arguments: object, config: str | None = None, env: dict[str, str] | None = None) -> object:
        # -m: the accelerate command of this very environment.
        launcher = [
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
            "--config_file",
            f"accelerate_configs/{config}",
            *("--main_process_port", "0"),  # any: another test's launch may have the usual one
        ]
        command = [sys.executable, *(launcher if config else []), *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})}
        )

    return run


@pytest.fixture(scope="session")
def trained_by_one(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """TINY by one process that nobody interrupted."""
    folder = RunFolder(tmp_path_factory.mktemp("one") / "run")
    process = start(image_folder, folder.path)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="session")
def trained_by_two(run_script: Run, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    """TINY by two processes on this machine's CPU; and what they said."""
    output = tmp_path_factory.mktemp("two") / "run"
    result = run_script(
        "scripts/train.py", *TINY_FLAGS, "--precision", "fp32", "--data", image_folder, "--output-dir", output,
        config="two_gpu.yaml",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return RunFolder(output), result.stdout


@pytest.fixture(scope="session")
def finished(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """TINY on 37 images, in this process: two epochs of four steps."""
    from test_training import run

    forget_accelerate_state()  # fixtures of the session come before those of a test
    return run(TINY, image_folder, tmp_path_factory.mktemp("run") / "finished", checkpoint_every=3, keep_checkpoints=9)
