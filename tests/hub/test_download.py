"""Downloads by the real client from a local Hub: only the files that are read, and no code is executed."""

import pickle
from pathlib import Path

import pytest
import torch
from helpers.hub_server import HubServer
from safetensors.torch import load as load_tensors

from resnet_in1k import ResNet
from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.model import resolve
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.model.weights import weights_to_save, write_tensors
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, write_recipe
from resnet_in1k.utils.errors import UserError

REPO = "someone/resnet18"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_tensors(weights_to_save(ResNet("resnet18", num_classes=2)), file)
    return file.read_bytes()


def downloaded(hub: HubServer) -> set[str]:
    """The files whose content was asked for."""
    return {path.rpartition("/")[2] for path in hub.requested if "/resolve/" in path}


def test_only_the_files_that_are_read_are_downloaded(hub: HubServer, weights: bytes):
    names = ["pytorch_model.bin", "model.safetensors.index.json", "config.json.bak", "old/config.json", "setup.py"]
    hub.publish(REPO, {"model.safetensors": weights, "config.json": b"{}", **dict.fromkeys(names, b"anything")})
    assert resolve_checkpoint(REPO).file.read_bytes() == weights
    assert not ResNet.from_pretrained(REPO).training
    assert downloaded(hub) == {"model.safetensors", "config.json"}


def test_a_repository_of_a_pickle_alone_is_read_without_executing_it(hub: HubServer, weights: bytes, tmp_path: Path):
    torch.save(load_tensors(weights), tmp_path / "plain.bin")
    hub.publish(REPO, {"pytorch_model.bin": (tmp_path / "plain.bin").read_bytes(), "config.json": b"{}"})
    assert torch.equal(ResNet.from_pretrained(REPO).fc.bias, load_tensors(weights)["fc.bias"])
    hub.publish(REPO, {"pytorch_model.bin": pickle.dumps(Path.mkdir), "config.json": b"{}"})
    with pytest.raises(UserError, match=r"cannot be read as plain tensors.*; no code in it was executed"):
        ResNet.from_pretrained(REPO)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_file_that_is_too_large_stops_before_anything_is_downloaded(hub, weights: bytes, monkeypatch, name: str):
    published = {**dict.fromkeys(resolve.MAX_BYTES, b"{}"), "model.safetensors": weights, name: b" " * 3000}
    if name == "pytorch_model.bin":  # downloaded only without safetensors
        del published["model.safetensors"]
    hub.publish(REPO, published)
    limits = dict.fromkeys(resolve.MAX_BYTES, 10**9)
    monkeypatch.setattr(resolve, "MAX_BYTES", limits | {name: 2000})
    words = rf"^{REPO}: {name} has 3 kB, more than the limit of 2 kB; if you trust it, download it yourself"
    for load in (ResNet.from_pretrained, resolve_checkpoint):
        with pytest.raises(UserError, match=words):
            load(REPO)
    assert downloaded(hub) == set()


def test_a_config_of_any_kind_does_not_reach_the_model(hub: HubServer, weights: bytes):
    """The mixin's own would pass its values to the model, or end in a RecursionError."""
    for config in ('{"num_classes": 1000000000, "architecture": "resnet152"}', "[" * 100_000, '"\x1b[2J"'):
        hub.publish(REPO, {"model.safetensors": weights, "config.json": config.encode()})
        model = ResNet.from_pretrained(REPO)
        assert (model.architecture, model.fc.out_features) == ("resnet18", 2)


def test_a_downloaded_recipe_does_not_say_what_to_evaluate_on(hub, weights: bytes, tiny: Recipe, tmp_path: Path):
    """The path may be one of this machine."""
    secret = tmp_path / "secret"
    secret.mkdir()
    run = RunFolder(tmp_path)
    write_recipe(run, "tiny", tiny, {"source": str(secret), "class_names": ["a", "b"]}, {})
    hub.publish(REPO, {"model.safetensors": weights, "recipe.json": run.recipe.read_bytes()})
    with pytest.raises(UserError, match="give --data"):
        evaluate(EvalOptions(ckpt=REPO, workers=0))
    assert resolve_checkpoint(REPO).data is None
    write_recipe(run, "tiny", tiny, {"source": "digits", "class_names": ["a", "b"]}, {})
    hub.publish(REPO, {"recipe.json": run.recipe.read_bytes()})
    assert resolve_checkpoint(REPO).data == "digits"  # a name, not a path


def test_without_the_hub_what_was_downloaded_before_is_used(hub: HubServer, weights: bytes):
    hub.publish(REPO, {"model.safetensors": weights})
    before = resolve_checkpoint(REPO).file
    hub.fail("GET", "/api/", 503, times=99)
    hub.requested.clear()
    assert resolve_checkpoint(REPO).file == before
    assert torch.equal(ResNet.from_pretrained(REPO).fc.bias, ResNet.from_pretrained(before).fc.bias)
    assert downloaded(hub) == set()
