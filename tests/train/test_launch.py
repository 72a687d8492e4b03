"""The scripts as a user runs them: through the real launcher, in separate processes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torchvision
from helpers.processes import TINY_FLAGS
from helpers.training import losses, run
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def test_two_processes_are_one_run(trained_by_two):
    folder, printed = trained_by_two
    assert "8 global = 2 processes × 4" in printed
    assert printed.count("epoch 2/2 done") == 1  # the main process alone prints
    assert len(re.findall(r"\b12 images$", printed, re.MULTILINE)) == 2  # one validation an epoch
    assert json.loads(folder.recipe.read_text())["world_size"] == 2
    assert len(folder.records()) == 8 + 2


def test_two_processes_take_the_steps_of_one(trained_by_two, tiny, image_folder: Path, tmp_path: Path):
    """Two halves on two processes are two accumulation steps on one: the same images, norms and gradients."""
    alone = run(tiny, image_folder, tmp_path / "run", gradient_accumulation_steps=2)
    ours, theirs = losses(trained_by_two[0]), losses(alone)
    assert len(ours) == len(theirs) == 8
    assert ours[:4] == pytest.approx(theirs[:4], rel=1e-4)  # rounding grows tenfold a step in so small a network


def test_two_processes_save_clean_weights(trained_by_two):
    folder, _ = trained_by_two
    for file in (folder.weights, folder.checkpoints / "step_00000008/model.safetensors"):
        torchvision.models.resnet18(num_classes=6).load_state_dict(load_file(file), strict=True)


@pytest.mark.parametrize("config", [None, "two_gpu.yaml"])
def test_evaluate_counts_the_same_on_one_and_on_two_processes(trained_by_two, run_script, tmp_path: Path, config):
    folder, _ = trained_by_two
    output = tmp_path / "eval.json"
    result = run_script(
        "scripts/evaluate.py", "--ckpt", folder.path, "--output", output, "--batch-size", 5, config=config
    )
    assert result.returncode == 0, result.stderr
    assert "12 images" in result.stdout
    ours, recorded = json.loads(output.read_text()), json.loads(folder.evaluation.read_text())
    assert ours.pop("loss") == pytest.approx(recorded.pop("loss"), abs=1e-5)
    assert ours == recorded


def test_two_processes_resume_where_one_stopped(run_script, tiny, image_folder: Path, tmp_path: Path):
    """Epoch 1 by one process with accumulation, epoch 2 by two: its losses are those of one throughout."""
    folder = run(tiny, image_folder, tmp_path / "run", gradient_accumulation_steps=2, keep_checkpoints=9)
    alone = losses(folder)
    shutil.rmtree(folder.checkpoints / "step_00000008")
    result = run_script(
        "scripts/train.py", *TINY_FLAGS, "--precision", "fp32", "--data", image_folder, "--output-dir", folder.path,
        "--resume", config="two_gpu.yaml",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "resuming after step 4" in result.stdout
    assert len(losses(folder)) == 8
    assert losses(folder)[:7] == pytest.approx(alone[:7], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scripts/train.py", "--data", "nowhere"], "--data nowhere: no such folder;"),
        (["scripts/train.py", "--epoch", "3", "--lr", "0"], "Unrecognized options: --epoch"),
        (["scripts/evaluate.py", "--ckpt", "nowhere"], "nowhere: no such file or folder;"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run_script, arguments: list, message: str):
    result = run_script(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_two_processes_fail_with_our_line_and_a_short_report(run_script):
    result = run_script("scripts/train.py", "--data", "nowhere", config="two_gpu.yaml")
    assert result.returncode != 0
    assert result.stderr.count("\nerror: --data nowhere") + result.stderr.startswith("error: --data nowhere") == 1
    assert "folder.py" not in result.stderr  # the launcher's report gives the reason, not our code


def test_one_process_on_the_cpu_uses_all_physical_cores(run_script, image_folder: Path, tmp_path: Path, all_cores):
    """accelerate launch sets OMP_NUM_THREADS=1 where a configuration does not say otherwise."""
    from resnet_in1k.utils.device import usable_cores

    result = run_script(
        "scripts/train.py", *TINY_FLAGS, "--data", image_folder, "--output-dir", tmp_path / "run", "--dry-run",
        config="one_gpu.yaml", env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"{usable_cores()} CPU thread" in result.stdout


def test_bad_image_stops_the_run_by_its_name(run_script, image_folder: Path, tmp_path: Path):
    data = Path(shutil.copytree(image_folder, tmp_path / "images"))
    for path in (data / "train/bee").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    result = run_script("scripts/train.py", *TINY_FLAGS, "--data", data, "--output-dir", tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {data / 'train/bee'}")
    assert "cannot be read as an image (" in result.stderr
    assert result.stderr.count("\n") == 1


def test_recipes_can_be_replaced_field_by_field(tiny):
    """The flags above are the tiny recipe."""
    from resnet_in1k.recipes.published import RECIPES

    flags = dict(zip(TINY_FLAGS[2::2], TINY_FLAGS[3::2], strict=True))
    flags.pop("--log-every")
    named = {flag.strip("-").replace("-", "_"): value for flag, value in flags.items()}
    typed = {name: type(getattr(RECIPES["demo"].recipe, name))(value) for name, value in named.items()}
    assert replace(RECIPES["demo"].recipe, **typed) == tiny
