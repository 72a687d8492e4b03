"""Weights of other projects on a local Hub, to evaluate and to start from: one line for each that will not do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from helpers.hub_server import HubServer
from helpers.training import run
from safetensors.torch import load_file, save
from torchvision.models.resnet import BasicBlock

from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.model.resnet import LAYOUTS, ResNet
from resnet_in1k.model.weights import weights_to_save
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.errors import UserError

REPO = "microsoft/resnet-18"
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resnet18 has one block in each stage."""
    monkeypatch.setitem(LAYOUTS, "resnet18", (BasicBlock, (1, 1, 1, 1)))


def publish(hub: HubServer, weights: bytes, config: dict) -> None:
    hub.publish(REPO, {"model.safetensors": weights, "config.json": json.dumps(config).encode()})


def timms_config(names: list[str] | None, num_classes: int) -> dict:
    config = {"architecture": "resnet18", "num_classes": num_classes, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    return config | ({"label_names": names} if names else {})


def weights_of(num_classes: int, architecture: str = "resnet18") -> bytes:
    return save(weights_to_save(ResNet(architecture, num_classes)))


@pytest.mark.slow
def test_a_repository_of_transformers_is_fine_tuned_and_resumed_offline(
    hub: HubServer, tiny: Recipe, image_folder: Path, tmp_path: Path
):
    """Made on the spot by transformers itself: the body is its own, the head has its rows of the data's classes.

    All parameters have one learning rate: those that were frozen have no momentum yet when their first step comes."""
    transformers = pytest.importorskip("transformers")
    labels = dict(enumerate(["yak", *reversed(CLASSES)]))
    config = transformers.ResNetConfig(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[1, 1, 1, 1], id2label=labels
    )
    theirs = transformers.ResNetForImageClassification(config)
    theirs.save_pretrained(tmp_path / "saved")
    publish(hub, (tmp_path / "saved/model.safetensors").read_bytes(), json.loads(config.to_json_string()))
    recipe = replace(tiny, freeze_epochs=1)  # the body stays as it was in the first epoch
    how = {"init_from": REPO, "keep_checkpoints": 9}
    whole = run(recipe, image_folder, tmp_path / "run", **how)
    facts = json.loads(whole.recipe.read_text())["init_from"]
    assert (facts["origin"], facts["head"]) == (REPO, "with 6 of its head's 7 classes")
    first = load_file(whole.checkpoints / "step_00000004/model.safetensors")
    state = theirs.state_dict()
    assert torch.equal(first["conv1.weight"], state["resnet.embedder.embedder.convolution.weight"])
    assert torch.equal(
        first["layer4.0.conv2.weight"], state["resnet.encoder.stages.3.layers.0.layer.1.convolution.weight"]
    )
    assert not torch.equal(first["fc.bias"], state["classifier.1.bias"][list(range(6, 0, -1))])

    last = (whole.checkpoints / "step_00000008/model.safetensors").read_bytes()
    hub.repos.clear()
    (whole.checkpoints / "step_00000008").rename(tmp_path / "away")
    run(recipe, image_folder, whole.path, resume=True, **how)
    assert (whole.checkpoints / "step_00000008/model.safetensors").read_bytes() == last


REFUSED = {
    "another architecture": (lambda hub: publish(hub, weights_of(6, "resnet34"), {}), "is a resnet34, .*resnet18"),
    "a ResNet of another kind": (
        lambda hub: publish(hub, save(timm.create_model("resnet18d", num_classes=6).state_dict()), {}),
        "is not a torchvision ResNet",
    ),
    "a damaged download": (lambda hub: publish(hub, weights_of(6)[:99_999], {}), "cannot be read as plain tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_started_from_is_one_line(
    hub: HubServer, tiny: Recipe, image_folder: Path, tmp_path: Path, name: str
):
    damage, message = REFUSED[name]
    damage(hub)
    with pytest.raises(UserError, match=message) as caught:
        run(tiny, image_folder, tmp_path / "run", init_from=REPO)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/recipe.json").exists()
    if name != "another architecture":
        with pytest.raises(UserError, match=message) as caught:
            evaluate(EvalOptions(ckpt=REPO, data=str(image_folder), workers=0))
        assert "\n" not in str(caught.value)


HEADS = {
    "classes that match in part": (7, ["yak", *CLASSES[1:], "gnu"], "the class names differ", "gnu|ant"),
    "another width, without names": (7, None, "its classes have no names", "has 7 classes, but 6 class names are in"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_does_not_fit_is_replaced_in_training_and_refused_in_evaluation(
    hub: HubServer, tiny: Recipe, image_folder: Path, tmp_path: Path, name: str
):
    num_outputs, names, why_new, why_refused = HEADS[name]
    publish(hub, weights_of(num_outputs), timms_config(names, num_outputs))
    folder = run(replace(tiny, epochs=1, global_batch_size=32), image_folder, tmp_path / "run", init_from=REPO)
    head = json.loads(folder.recipe.read_text())["init_from"]["head"]
    assert head == f"with a new head of 6 classes, because {why_new}"
    with pytest.raises(UserError, match=why_refused) as caught:
        evaluate(EvalOptions(ckpt=REPO, data=str(image_folder), workers=0))
    assert "\n" not in str(caught.value)
