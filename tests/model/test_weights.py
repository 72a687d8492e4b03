"""Reading and writing weights: clean keys, equal bytes, no execution of pickles, one line for each bad file."""

import hashlib
import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from helpers.bomb import Bomb
from safetensors.torch import load_file

from resnet_in1k.model.resnet import ResNet, load_model
from resnet_in1k.model.weights import read_tensors, weights_file, weights_to_save, write_tensors
from resnet_in1k.utils.errors import UserError


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(torch.nn.parallel.DistributedDataParallel(m)),
        lambda m: torch.nn.parallel.DistributedDataParallel(torch.compile(m)),
    ],
    ids=["compile(ddp)", "ddp(compile)"],
)
def test_keys_are_clean_however_the_model_was_wrapped(process_group, wrap):
    model = ResNet("resnet18", num_classes=3)
    wrapped = wrap(model)
    assert wrapped.state_dict().keys() != model.state_dict().keys()
    assert weights_to_save(wrapped).keys() == torchvision.models.resnet18().state_dict().keys()


def test_prefix_is_removed_at_the_start_only(tmp_path: Path):
    torch.save({"module._orig_mod.module.fc.module.weight": torch.zeros(1)}, tmp_path / "old.pth")
    assert list(read_tensors(tmp_path / "old.pth")) == ["fc.module.weight"]


def test_saved_channels_last_weights_load_strictly_into_torchvision(tmp_path: Path):
    model = ResNet("resnet18", num_classes=3).to(memory_format=torch.channels_last)
    write_tensors(weights_to_save(model), tmp_path / "model.safetensors")
    theirs = torchvision.models.resnet18(num_classes=3)
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value), key


def test_same_weights_have_the_same_bytes(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    saved = weights_to_save(model)
    write_tensors(saved, tmp_path / "one.safetensors")
    write_tensors(weights_to_save(model.to(memory_format=torch.channels_last)), tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    model[0].bias.data += 1
    assert not torch.equal(saved["0.bias"], model[0].bias), "what is saved shares no memory with the model"


def test_pickle_is_never_executed(tmp_path: Path):
    torch.save(OrderedDict(weights=Bomb(tmp_path / "boom")), tmp_path / "bomb.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    for name in ("bomb.pth", "plain.pth"):
        with pytest.raises(UserError, match=f"{name} cannot be read as plain tensors.*; no code in it was executed"):
            load_model(tmp_path / name)
    assert not (tmp_path / "boom").exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert (tmp_path / "boom").exists()  # it is one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file or folder"),
        (lambda p: p.mkdir(), "no model.safetensors in it"),
        (lambda p: p.write_bytes(b"\x08\x00\x00\x00"), "cannot be read as plain tensors"),
        *(
            (lambda p, first=first: p.write_text(first + "rror: not found"), "cannot be read as plain tensors")
            for first in "eatus."  # opcodes of pickle, each of which fails in another way
        ),
        (lambda p: torch.save({"a": torch.zeros(1)}, p), "is not a torchvision ResNet"),
        (lambda p: torch.save([torch.zeros(1)], p), "is not a state dict"),
        (lambda p: torch.save({}, p), "is not a state dict"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, make, message: str):
    make(tmp_path / "weights")
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path / "weights")
    assert "\n" not in str(error.value)


def test_weights_of_a_checkpoint_must_have_the_recorded_sum(tmp_path: Path):
    """A file with a flipped bit is still a valid safetensors file."""
    file = tmp_path / "model.safetensors"
    write_tensors({"a": torch.zeros(100)}, file)
    recorded = {"sha256": {"model.safetensors": hashlib.sha256(file.read_bytes()).hexdigest()}}
    (tmp_path / "state.json").write_text(json.dumps(recorded))
    assert weights_file(tmp_path) == weights_file(file) == file

    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert load_file(file).keys() == {"a"}
    for checkpoint in (tmp_path, file):
        with pytest.raises(UserError, match=r"model.safetensors is damaged: its sha256 does not match"):
            weights_file(checkpoint)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json cannot be read \(JSONDecodeError"):
        weights_file(tmp_path)
