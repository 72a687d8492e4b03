"""The package as a wheel, in an environment without the checkout and from another folder; and quiet launches."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.processes import ROOT, accelerate_launch, free_port
from PIL import Image, ImageDraw

from resnet_in1k.__main__ import COMMANDS

pytestmark = pytest.mark.slow
SMALL = ("--model", "resnet18", "--epochs", "1", "--image-size", "32", "--workers", "0")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy, as setuptools leaves files next to the source; no network is needed."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    shutil.copytree(ROOT / "resnet_in1k", copy / "resnet_in1k", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", copy.parent, copy], check=True)
    (built,) = copy.parent.glob("*.whl")
    return built


class Installed:
    """An environment in which only the wheel is installed, inside a repository that is not this project's."""

    def __init__(self, folder: Path, wheel: Path):
        self.folder, self.python = folder, folder / ".venv/bin/python"
        git = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@example.com"]
        subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "mine"], check=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--no-index", "--quiet"]
        subprocess.run([*pip, wheel], check=True)
        # The dependencies. Python does not read the .pth files there, so none of them leads to the checkout.
        (site,) = (folder / ".venv/lib").glob("python*/site-packages")
        (site / "dependencies.pth").write_text("\n".join(each for each in sys.path if each.endswith("-packages")))

    def run(self, *command: object) -> str:
        """Return what a command printed; the first word is a program in the environment's bin."""
        words = [str(self.folder / ".venv/bin" / str(command[0])), *map(str, command[1:])]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(words, cwd=self.folder, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("elsewhere"), wheel)


@pytest.fixture(scope="module")
def trained(installed: Installed) -> str:
    return installed.run("resnet-in1k", "train", "--recipe", "demo", *SMALL, "--data", "digits", "--output-dir", "run")


def test_the_wheel_has_every_file_of_the_package(wheel: Path):
    tracked = subprocess.run(["git", "ls-files", "resnet_in1k"], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("resnet_in1k/")}
    assert packed == set(tracked.stdout.split())


def test_the_package_is_not_that_of_the_checkout(installed: Installed):
    code = "import resnet_in1k, torch, sys; print(resnet_in1k.__file__); print(*sys.path)"
    file, path = installed.run("python", "-c", code).splitlines()
    assert file.startswith(str(installed.folder))
    assert str(ROOT) not in path.split()


def test_the_command_alone_describes_every_command(installed: Installed):
    lines = installed.run("resnet-in1k").splitlines()
    described = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    assert [name for name, _ in described] == list(COMMANDS)
    assert all(20 < len(text) < 110 and text.endswith(".") for _, text in described)
    assert lines[-1].startswith("Flags and examples of a command: resnet-in1k COMMAND --help.")
    assert installed.run("python", "-m", "resnet_in1k").splitlines() == lines


def test_train_evaluate_predict_and_publish(installed: Installed, trained: str):
    assert "evaluate them:  resnet-in1k evaluate --ckpt run\n" in trained
    assert "reproduced: the recorded eval.json has the same counts" in installed.run(
        "resnet-in1k", "evaluate", "--ckpt", "run"
    )
    picture = Image.new("RGB", (48, 48))
    ImageDraw.Draw(picture).line((24, 4, 24, 44), fill="white", width=6)
    picture.save(installed.folder / "one.png")
    printed = installed.run("resnet-in1k", "predict", "--ckpt", "run", "--json", "one.png")
    shares = [each["probability"] for each in json.loads(printed)["predictions"]]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    published = installed.run("resnet-in1k", "push-to-hub", "--run", "run", "--repo-id", "me/digits", "--dry-run")
    assert "dry run: nothing was sent" in published
    assert (installed.folder / "run/hub/README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_the_commit_is_not_that_of_another_repository(installed: Installed, trained: str):
    assert json.loads((installed.folder / "run/recipe.json").read_text())["commit"] is None


def test_two_processes_by_accelerate(installed: Installed, image_folder: Path):
    config = ("--config_file", ROOT / "accelerate_configs/two_gpu.yaml", "--main_process_port", "0")
    launch = ("python", "-m", "accelerate.commands.accelerate_cli", "launch", *config, "-m", "resnet_in1k")
    few = ("--data", image_folder, "--global-batch-size", "8", "--output-dir", "two")
    printed = installed.run(*launch, "train", "--recipe", "demo", *SMALL, *few)
    assert "= 2 processes × " in printed
    assert "evaluate them:  python -m resnet_in1k evaluate --ckpt two\n" in printed
    assert json.loads((installed.folder / "two/recipe.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "accelerate_configs").iterdir()))
def test_a_launch_prints_nothing_of_its_own(config: str, tmp_path: Path):
    """Launch a program that prints its rank by each configuration, on all of its machines."""
    program = tmp_path / "program.py"
    program.write_text("import os, sys; sys.stdout.write(f'rank {os.environ.get(\"RANK\", 0)}\\n')")
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    port = ["--main_process_port", str(free_port())]
    machines = [
        subprocess.Popen(
            [sys.executable, *accelerate_launch(config), *port, *of_machine, program],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for of_machine in ([["--machine_rank", "0"], ["--machine_rank", "1"]] if config == "two_nodes.yaml" else [[]])
    ]
    printed = [machine.communicate(timeout=120) for machine in machines]
    assert [errors for _, errors in printed] == [""] * len(machines)
    ranks = sorted(line for output, _ in printed for line in output.splitlines())
    expected = {"cpu.yaml": 1, "one_gpu.yaml": 1, "two_gpu.yaml": 2, "two_nodes.yaml": 4, "eight_gpu.yaml": 8}[config]
    assert ranks == [f"rank {number}" for number in range(expected)]
