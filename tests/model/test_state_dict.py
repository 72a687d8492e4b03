"""Weights of other training scripts: what is taken from each file, and one line for each that does not fit."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from resnet_in1k import ResNet
from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.model.state_dict import read_resnet
from resnet_in1k.utils.errors import UserError

State = dict[str, Tensor]


def state_of(seed: int) -> State:
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=3).state_dict()


RAW, AVERAGE = state_of(0), state_of(1)
BODY = {key: tensor for key, tensor in RAW.items() if not key.startswith("fc.")}


def under(prefix: str, state: State = RAW) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def head(prefix: str, *names: str) -> State:
    """The last layer under another name, and zeros of other layers next to it."""
    return {f"{prefix}.{name}": RAW[f"fc.{name}"] for name in ("weight", "bias")} | {
        name: torch.zeros(512, 512) for name in names
    }


def numbered(key: str) -> str:
    """The key after nn.Sequential(*list(resnet.children())[:-1])."""
    children = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    first, _, rest = key.partition(".")
    return f"{children[first]}.{rest}"


SCRIPTS: dict[str, tuple[object, str]] = {
    "torchvision of 2017": ({key: RAW[key] for key in RAW if not key.endswith("num_batches_tracked")}, ""),
    "torchvision's references": ({"model": RAW, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, "model."),
    "PyTorch's example": ({"arch": "resnet18", "state_dict": under("module.")}, "state_dict.module."),
    "Lightning": ({"state_dict": under("net.") | {"loss.weight": torch.ones(3)}, "loops": {}}, "state_dict.net."),
    "mmpretrain": ({"meta": {}, "state_dict": under("backbone.", BODY) | head("head.fc")}, "state_dict.backbone."),
    "compiled and distributed": (under("module._orig_mod."), ""),
    "compiled by stage": ({key.replace("layer3.", "layer3._orig_mod."): RAW[key] for key in RAW}, ""),
    "dropout before the last layer": (BODY | head("fc.1"), ""),
    "float16": ({key: tensor.half() for key, tensor in RAW.items()}, ""),
    "the same twice": ({"online": {"net": RAW}, "shared": RAW}, "online.net."),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_of_another_script_gives_its_own_models_logits(name: str, tmp_path: Path, caplog):
    saved, prefix = SCRIPTS[name]
    torch.save(saved, tmp_path / "model.pth")
    theirs, images = torchvision.models.resnet18(num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    theirs.load_state_dict(RAW)
    with torch.inference_mode():
        tolerance = 1e-2 if name == "float16" else 0
        ours = load_model(tmp_path / "model.pth").eval()
        torch.testing.assert_close(ours(images), theirs(images), rtol=tolerance, atol=tolerance)
    told = [f"{tmp_path}/model.pth: took the weights under '{prefix}'"] if prefix else []
    assert caplog.messages == told


BACKBONES: dict[str, tuple[State, str]] = {
    "without a last layer": (BODY, ""),
    "MoCo": (under("encoder_k.", BODY) | under("encoder_q.", BODY) | head("encoder_q.fc.2"), "encoder_q."),
    "DINO": ({"student": under("backbone.", BODY) | head("head", "head.mlp.weight")}, "student.backbone."),
    "numbered children": ({f"features.{numbered(key)}": tensor for key, tensor in BODY.items()}, "features."),
    "a norm after it": (under("net.", BODY) | head("head") | {"neck.weight": torch.ones(512)}, "net."),
    "two layers after it": (BODY | head("fc.2", "fc.0.weight"), ""),
}
BACKBONES["MoCo"][0]["encoder_q.fc.0.weight"] = torch.zeros(512, 512)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_can_be_trained_further_but_gives_no_logits(name: str, tmp_path: Path, caplog):
    saved, prefix = BACKBONES[name]
    torch.save(saved, tmp_path / "model.pth")
    architecture, state = read_resnet(tmp_path / "model.pth")
    assert architecture == "resnet18"
    assert state.keys() == BODY.keys()
    assert all(torch.equal(state[key], BODY[key]) for key in BODY)
    assert all(f"took the weights under '{prefix}'" in message for message in caplog.messages)
    assert len(caplog.messages) == bool(prefix)
    with pytest.raises(UserError, match=r"has no last layer, .*; train one: train.py --init-from"):
        load_model(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("saved", "raw", "average"),
    [
        ({"state_dict": RAW, "state_dict_ema": AVERAGE}, "state_dict.", "state_dict_ema."),  # timm
        ({"model": RAW, "model_ema": under("module.", AVERAGE)}, "model.", "model_ema.module."),  # torchvision
        (under("online_encoder.") | under("target_encoder.", AVERAGE), "online_encoder.", "target_encoder."),  # BYOL
    ],
)
def test_averages_are_taken_if_wanted_and_the_choice_is_logged(
    saved: dict, raw: str, average: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "model.pth"
    torch.save(saved, file)
    assert torch.equal(ResNet.from_pretrained(file).fc.weight, RAW["fc.weight"])
    assert caplog.messages == [
        f"{file}: took the weights under '{raw}'; --weights ema takes the averages under '{average}'"
    ]
    model = ResNet.from_pretrained(file, weights="ema")
    assert torch.equal(model.fc.weight, AVERAGE["fc.weight"])
    assert resolve_checkpoint(file, "ema").kind == "ema"


def test_what_is_not_in_the_file_is_not_taken_for_it(tmp_path: Path, image_folder: Path):
    torch.save({"model_ema": AVERAGE}, tmp_path / "average.pth")
    assert torch.equal(load_model(tmp_path / "average.pth", "ema").fc.weight, AVERAGE["fc.weight"])
    torch.save(RAW, tmp_path / "raw.pth")
    torch.save({"a": RAW, "b": AVERAGE}, tmp_path / "two.pth")
    for name, wanted, message in (
        ("average", None, r"average\.pth has only averages; --weights ema takes the averages under 'model_ema\.'"),
        ("raw", "ema", r"raw\.pth has only weights; --weights model takes"),
        ("two", None, r"has several ResNets, under 'a\.' and 'b\.'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(EvalOptions(ckpt=str(tmp_path / f"{name}.pth"), weights=wanted, data=str(image_folder), workers=0))


def test_weights_in_several_files_are_joined(tmp_path: Path):
    keys = list(RAW)
    parts = {f"model-0000{number}-of-00002.safetensors": keys[number - 1 :: 2] for number in (1, 2)}
    for name, own in parts.items():
        save_file({key: RAW[key] for key in own}, tmp_path / name)
    index = {"weight_map": {key: name for name, own in parts.items() for key in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(ResNet.from_pretrained(tmp_path).layer4[1].conv2.weight, RAW["layer4.1.conv2.weight"])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        ResNet.from_pretrained(tmp_path)


def state_like(make: Callable[[], torch.nn.Module]) -> State:
    """Tensors of these shapes, in little memory."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in make().state_dict().items()}
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


MISFITS: dict[str, tuple[Callable[[], State], str]] = {
    "wide": (
        lambda: state_like(torchvision.models.wide_resnet50_2),
        "found layer1.0.conv1.weight (128, 64, 1, 1), layer1.0.bn1.weight (128,); expected layer1.0.conv1.weight "
        "(64, 64, 1, 1), layer1.0.bn1.weight (64,); nearest is resnet50, and it looks like wide_resnet50_2",
    ),
    "in groups": (
        lambda: state_like(torchvision.models.resnext101_64x4d),
        "nearest is resnet101, and it looks like resnext101_64x4d",
    ),
    "another stem": (
        lambda: state_like(lambda: timm.create_model("resnet50d")),
        "found conv1.0.weight, conv1.1.weight; expected conv1.weight, layer1.0.downsample.0.weight; nearest is resnet5",
    ),
    "attention": (
        lambda: state_like(lambda: timm.create_model("seresnet50")),
        "found layer1.0.se.fc1.weight, layer1.0.se.fc1.bias; expected no such tensors; nearest is resnet50",
    ),
    "small images": (
        lambda: RAW | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
        "found conv1.weight (64, 3, 3, 3); expected conv1.weight (64, 3, 7, 7); nearest is resnet18",
    ),
    "quantized": (
        lambda: RAW | {"conv1.weight": torch.zeros(64, 3, 7, 7, dtype=torch.int8)},
        "(64, 3, 7, 7) torch.int8",
    ),
    "no ResNet": (
        lambda: {"\x1b[2Ja": torch.zeros(1), "b": torch.zeros(1)},
        "found \\x1b[2Ja, b; expected conv1.weight, bn1.weight",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_one_line_with_the_keys_and_the_nearest(name: str, tmp_path: Path):
    make, message = MISFITS[name]
    torch.save(make(), tmp_path / "model.pth")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_resnet(tmp_path / "model.pth")
    assert "is not a torchvision ResNet: found " in str(error.value)
    assert str(error.value).isprintable()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer.safetensors": (lambda path: path.write_text(POINTER), "is a Git LFS pointer; run git lfs pull"),
    "page.pth": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html>"), "is a web page; download the file"),
    "keras.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "is a file of Keras; weights of PyTorch"),
    "empty.pth": (lambda path: path.write_bytes(b""), "is incomplete; download or copy it again"),
    "script.pt": (lambda path: torch.jit.script(torch.nn.Linear(1, 1)).save(path), "is a TorchScript archive"),
    "model.pth": (lambda path: torch.save(torch.nn.Linear(1, 1), path), "holds a complete pickled model, torch.nn"),
    "path.pth": (lambda path: torch.save(argparse.Namespace(folder=Path()), path), "holds Python objects, pathlib."),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_named_without_advice_to_execute_it(name: str, tmp_path: Path):
    write, message = FILES[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} cannot be read as plain tensors: it {message}") as error:
        load_model(tmp_path / name)
    assert str(error.value).isprintable()
    assert "weights_only" not in str(error.value)
