"""Each named recipe, at the size of a test: it trains, saves, is resumed to the same bits, and evaluates."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import ROOT, TWO_PROCESSES, assert_same_end
from helpers.training import losses, rewind, run, small_version
from safetensors.torch import load_file

from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.utils.files import sha256_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow")]


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_trains_and_resumes_and_evaluates(name: str, image_folder: Path, finished: RunFolder, tmp_path: Path):
    recipe, how = small_version(name)
    how |= {"teacher": str(finished.path)} if recipe.teacher_weight else {}
    folder = run(recipe, image_folder, tmp_path / "run", **how)
    assert len(losses(folder)) == 4
    assert np.isfinite(losses(folder)).all()
    assert read_recipe(folder)[0] == recipe
    resumed = run(recipe, image_folder, rewind(folder, 2, tmp_path / "copy").path, resume=True, **how)
    assert_same_end(resumed, folder)

    evaluation = evaluate(EvalOptions(ckpt=str(folder.path), workers=0))
    recorded = json.loads(folder.evaluation.read_text())
    assert evaluation.counts["top1_correct"] == recorded["top1_correct"]
    assert evaluation.loss == pytest.approx(recorded["loss"], abs=1e-5)
    assert recorded["weights"] == recipe.publish


def test_recipes_by_two_processes_are_resumed_to_the_same_bits(image_folder: Path, tmp_path: Path):
    """Between them: each optimizer but SGD, averages, accumulation, mixing, stochastic depth, repeated augmentation."""
    names = ("mlperf-lars", "a2", "one-gpu-24gb", "sprint")
    command = [sys.executable, *TWO_PROCESSES, "tests/helpers/recipes_by_two.py", image_folder, tmp_path, *names]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True, timeout=400)
    for name in names:
        folder, resumed = RunFolder(tmp_path / name), RunFolder(tmp_path / f"{name}-resumed")
        assert len(losses(folder)) == 4
        assert_same_end(resumed, folder)


def test_average_and_model_are_both_evaluated_and_one_is_published(image_folder: Path, tmp_path: Path):
    """Two epochs like tv2's: the published weights are the average's, and the log has the model's accuracy too."""
    recipe, how = small_version("tv2")
    recipe = replace(recipe, epochs=2, ema_every_steps=1, ema_decay=1 - 2e-6, lr=0.01)
    folder = run(recipe, image_folder, tmp_path / "run", **how)
    best = json.loads(folder.evaluation.read_text())
    epochs = [record for record in folder.records() if record["kind"] == "epoch"]
    assert [record["weights"] for record in epochs] == ["ema", "ema"]
    assert {"model_val_loss", "model_top1_accuracy", "model_top5_accuracy"} <= epochs[0].keys()
    chosen = max(epochs, key=lambda record: record["top1_accuracy"])
    checkpoint = folder.checkpoints / f"step_{chosen['step']:08d}"
    assert sha256_of(folder.weights) == best["weights_sha256"] == sha256_of(checkpoint / "ema.safetensors")
    average, model = (load_file(checkpoint / f"{name}.safetensors") for name in ("ema", "model"))
    assert average.keys() == model.keys()
    assert not torch.equal(average["fc.weight"], model["fc.weight"])
    for name, prefix in (("ema", ""), ("model", "model_")):
        output = tmp_path / "eval.json"
        evaluation = evaluate(EvalOptions(ckpt=str(checkpoint / f"{name}.safetensors"), workers=0, output=output))
        assert json.loads(output.read_text())["weights"] == name
        assert evaluation.top1_accuracy == chosen[f"{prefix}top1_accuracy"]
        assert evaluation.loss == pytest.approx(chosen[f"{prefix}val_loss"], rel=1e-5)

    of_model = run(replace(recipe, publish="model"), image_folder, tmp_path / "model", **how)
    other = [record for record in of_model.records() if record["kind"] == "epoch"]
    assert [record["ema_val_loss"] for record in other] == [record["val_loss"] for record in epochs]
    step = max(other, key=lambda record: record["top1_accuracy"])["step"]
    assert json.loads(of_model.evaluation.read_text())["weights"] == "model"
    assert sha256_of(of_model.weights) == sha256_of(of_model.checkpoints / f"step_{step:08d}/model.safetensors")
