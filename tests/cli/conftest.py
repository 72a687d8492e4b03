"""A run to evaluate and predict with, without having trained it."""

import json
from pathlib import Path

import pytest
import torch
from helpers.training import TINY, reset_accelerate_state

from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.model.weights import weights_to_save, write_tensors
from resnet_in1k.run_folder import RunFolder, write_recipe
from resnet_in1k.train.trainer import describe_data


@pytest.fixture(scope="session")
def evaluated(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """recipe.json, random weights for six classes, and their eval.json."""
    reset_accelerate_state()
    folder = RunFolder(tmp_path_factory.mktemp("evaluated") / "run")
    folder.checkpoints.mkdir(parents=True)
    write_recipe(folder, "tiny", TINY, describe_data(*open_train_and_val(str(image_folder))), {})
    torch.manual_seed(0)
    model = ResNet("resnet18", num_classes=6)
    torch.nn.init.normal_(model.fc.weight, std=1)  # confident, and not always of the same class
    write_tensors(weights_to_save(model), folder.weights)
    evaluate(EvalOptions(ckpt=str(folder.path), workers=0, output=folder.evaluation))
    recorded = json.loads(folder.evaluation.read_text())
    assert 0 < recorded["top1_correct"] < 12, "a test may want either"
    return folder
