"""The scripts as a user runs them: through the real launcher, in separate processes."""

import json
import re
from pathlib import Path

import pytest
import torchvision
from safetensors.torch import load_file

from resnet_in1k.cli.evaluate import EvalOptions, evaluate

pytestmark = pytest.mark.slow


def test_two_processes_are_one_run_with_clean_weights(trained_by_two):
    folder, printed = trained_by_two
    assert "8 global = 2 processes × 4" in printed
    assert printed.count("epoch 2/2 done") == 1  # the main process alone prints
    assert len(re.findall(r"\b12 images$", printed, re.MULTILINE)) == 2  # one validation an epoch
    assert json.loads(folder.recipe.read_text())["world_size"] == 2
    assert len(folder.records()) == 8 + 2
    for file in (folder.weights, folder.checkpoints / "step_00000008/model.safetensors"):
        torchvision.models.resnet18(num_classes=6).load_state_dict(load_file(file), strict=True)


def test_evaluate_counts_the_same_on_one_and_on_two_processes(trained_by_two, run_script, tmp_path: Path):
    folder, _ = trained_by_two
    recorded = json.loads(folder.evaluation.read_text())
    output = tmp_path / "eval.json"
    what = ("--ckpt", folder.path, "--output", output, "--batch-size", 5)
    result = run_script("scripts/evaluate.py", *what, config="two_gpu.yaml")
    assert result.returncode == 0, result.stderr
    assert "12 images" in result.stdout
    by_two = json.loads(output.read_text())
    evaluate(EvalOptions(ckpt=str(folder.path), output=output, batch_size=5))
    for ours in (by_two, json.loads(output.read_text())):
        assert ours.pop("loss") == pytest.approx(recorded["loss"], abs=1e-5)
        assert {**ours, "loss": recorded["loss"]} == recorded


def test_bad_input_is_one_line_and_status_2(run_script):
    result = run_script("scripts/train.py", "--data", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: nowhere/train: no such folder;")
    assert result.stderr.count("\n") == 1
