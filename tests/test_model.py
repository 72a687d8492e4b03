import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from resnet_in1k import ResNet
from resnet_in1k.checkpoint import save_weights
from resnet_in1k.errors import UserError
from resnet_in1k.model import LAYOUTS, clean_keys, load_model, weights_to_save


@pytest.mark.parametrize("architecture", list(LAYOUTS))
def test_has_torchvisions_keys_and_shapes(architecture: str):
    with torch.device("meta"):
        ours = ResNet(architecture, num_classes=7).state_dict()
        theirs = getattr(torchvision.models, architecture)(num_classes=7).state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [(key, value.shape) for key, value in theirs.items()]


@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_starts_with_torchvisions_weights_and_gives_its_logits(zero_init_residual: bool):
    torch.manual_seed(0)
    ours = ResNet("resnet50", 10, zero_init_residual).eval()
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=10, zero_init_residual=zero_init_residual).eval()
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(inputs), theirs(inputs))


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.nn.parallel.DistributedDataParallel(m),
        lambda m: torch.compile(m),
        lambda m: torch.compile(torch.nn.parallel.DistributedDataParallel(m)),
        lambda m: torch.nn.parallel.DistributedDataParallel(torch.compile(m)),
    ],
    ids=["ddp", "compile", "compile(ddp)", "ddp(compile)"],
)
def test_keys_are_clean_however_the_model_was_wrapped(process_group, wrap):
    model = ResNet("resnet18", num_classes=3)
    wrapped = wrap(model)
    assert wrapped.state_dict().keys() != model.state_dict().keys()
    assert clean_keys(wrapped.state_dict()).keys() == model.state_dict().keys()
    assert weights_to_save(wrapped).keys() == torchvision.models.resnet18().state_dict().keys()


def test_saved_channels_last_weights_load_strictly_into_torchvision(tmp_path: Path):
    model = ResNet("resnet18", num_classes=3).to(memory_format=torch.channels_last)
    save_weights(weights_to_save(model), tmp_path / "model.safetensors")
    save_weights(weights_to_save(model), tmp_path / "again.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    theirs = torchvision.models.resnet18(num_classes=3)
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value), key


def test_three_lines_load_the_weights(tmp_path: Path):
    original = ResNet("resnet34", num_classes=4).eval()
    save_weights(weights_to_save(original), tmp_path / "model.safetensors")
    model = ResNet.from_pretrained(tmp_path)
    assert (model.architecture, model.fc.out_features, model.training) == ("resnet34", 4, False)
    inputs = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(inputs), original(inputs))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_reads_an_old_pth_with_prefixes(tmp_path: Path, wrapper: str | None):
    original = ResNet("resnet18", num_classes=3)
    state = {f"module.{key}": value for key, value in original.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "old.pth")
    model = load_model(tmp_path / "old.pth")
    assert torch.equal(model.fc.weight, original.fc.weight)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_executed(tmp_path: Path):
    torch.save(OrderedDict(weights=Bomb(tmp_path / "boom")), tmp_path / "bomb.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    for name in ("bomb.pth", "plain.pth"):
        with pytest.raises(UserError, match=f"{name} holds no plain tensors"):
            load_model(tmp_path / name)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file or folder"),
        (lambda p: p.mkdir(), "no model.safetensors in it"),
        (lambda p: p.write_bytes(b"\x08\x00\x00\x00"), "holds no plain tensors"),
        *(
            (lambda p, first=first: p.write_text(first + "rror: not found"), "holds no plain tensors")
            for first in "eatus."
        ),
        (lambda p: torch.save({"a": torch.zeros(1)}, p), "holds no torchvision ResNet"),
        (lambda p: torch.save([torch.zeros(1)], p), "is not a state dict"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, make, message: str):
    make(tmp_path / "weights")
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path / "weights")
    assert "\n" not in str(error.value)


def test_a_cut_safetensors_file_is_named(tmp_path: Path):
    save_weights(weights_to_save(ResNet("resnet18", 2)), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model.safetensors is not a whole safetensors file"):
        load_model(tmp_path)
