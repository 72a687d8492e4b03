"""Weights saved by the code of other projects: equal logits and equal preprocessing."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.models import save_for_hf

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.resolve import Weights, resolve_checkpoint
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import sha256_of
from resnet_in1k.utils.imagenet import names_by_wnid


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Give the norms other statistics than those of a new model."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def prepared(weights: Weights, image: Image.Image) -> torch.Tensor:
    """Prepare an image for these weights, (1, 3, S, S), with the code of this project."""
    preprocessing = weights.preprocessing
    square = preprocessing.crop(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return normalize(square.unsqueeze(0), preprocessing.mean, preprocessing.std)


@pytest.fixture
def photograph(photographs: list[np.ndarray]) -> Image.Image:
    return Image.fromarray(photographs[0])


GRAY_LEVEL = 1 / 255 / 0.2


def test_timms_own_files_of_imagenet_have_its_class_names(tmp_path: Path):
    """tests/cli/test_evaluate_published.py compares what timm computes of them."""
    save_for_hf(timm.create_model("resnet18", pretrained=False), tmp_path, safe_serialization=True)
    assert resolve_checkpoint(tmp_path).class_names == list(names_by_wnid())


def test_numbered_names_are_no_names(tmp_path: Path):
    """transformers writes these for a model whose classes nobody has named."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({**TRANSFORMERS, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    assert resolve_checkpoint(tmp_path).class_names is None


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_transformers_own_files(kind: str, photograph: Image.Image, tmp_path: Path):
    """A model made on the spot, with the processor of microsoft/resnet-50."""
    transformers = pytest.importorskip("transformers")
    sizes, depths = {
        "basic": ([64, 128, 256, 512], [2, 2, 2, 2]),
        "bottleneck": ([256, 512, 1024, 2048], [3, 4, 6, 3]),
    }[kind]
    labels = {number: f"name {number}" for number in range(12)}
    config = transformers.ResNetConfig(layer_type=kind, hidden_sizes=sizes, depths=depths, id2label=labels)
    model = randomized(transformers.ResNetForImageClassification(config))
    model.save_pretrained(tmp_path)
    processor = transformers.ConvNextImageProcessor(
        size={"shortest_edge": 224}, crop_pct=0.875, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    processor.save_pretrained(tmp_path)
    weights = resolve_checkpoint(tmp_path)
    assert weights.class_names == list(labels.values())
    square = photograph.crop((0, 0, 400, 400))  # it rounds the corner of a crop otherwise
    theirs = processor(square, return_tensors="pt")["pixel_values"]
    assert (prepared(weights, square) - theirs).abs().max() < 1.01 * GRAY_LEVEL
    with torch.inference_mode():
        logits = load_model(weights.file).eval()(theirs)
        torch.testing.assert_close(logits, model(theirs).logits, rtol=0, atol=1e-5)


@pytest.fixture
def torchvision_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


def serve(model: torch.nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "") -> Path:
    """Publish a model like torchvision: a pickle with the beginning of its sha256 in its name."""
    torch.save(model.state_dict(), folder / "new.pth")
    file = (folder / "new.pth").rename(folder / (name or f"resnet18-{sha256_of(folder / 'new.pth')[:8]}.pth"))
    real = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    published = SimpleNamespace(url=file.as_uri(), transforms=real.transforms, meta=real.meta)
    known = SimpleNamespace(__members__={"DEFAULT": published, "IMAGENET1K_V1": published})
    monkeypatch.setattr("resnet_in1k.model.foreign.get_model_weights", lambda _: known)
    return file


def test_torchvisions_own_files(photograph: Image.Image, torchvision_cache: Path, tmp_path: Path, monkeypatch):
    model = randomized(torchvision.models.resnet18())
    served = serve(model, tmp_path, monkeypatch)
    weights = resolve_checkpoint("torchvision/resnet18.IMAGENET1K_V1")
    assert weights.file == torchvision_cache / served.name
    assert weights.class_names == list(names_by_wnid())
    theirs = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()(photograph).unsqueeze(0)
    assert (prepared(weights, photograph) - theirs).abs().max() < 1.01 * GRAY_LEVEL
    with torch.inference_mode():
        torch.testing.assert_close(load_model(weights.file).eval()(theirs), model(theirs), rtol=0, atol=1e-6)

    served.unlink()  # what was downloaded is enough
    assert resolve_checkpoint("torchvision/resnet18.IMAGENET1K_V1").file == weights.file
    data = bytearray(weights.file.read_bytes())
    data[-1] ^= 1
    weights.file.write_bytes(data)
    with pytest.raises(UserError, match=r"resnet18-\w+\.pth is damaged: its sha256 does not begin with \w{8}; remove"):
        resolve_checkpoint("torchvision/resnet18.IMAGENET1K_V1")


def test_torchvision_weights_that_are_not_available(torchvision_cache: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match=r"torchvision/resnet50.V3: torchvision has resnet50.IMAGENET1K_V1, resnet50"):
        resolve_checkpoint("torchvision/resnet50.V3")
    with pytest.raises(UserError, match="torchvision/vgg16: vgg16 is not one of resnet18"):
        resolve_checkpoint("torchvision/vgg16")
    served = serve(randomized(torchvision.models.resnet18()), tmp_path, monkeypatch, name="resnet18-00000000.pth")
    with pytest.raises(UserError, match=r"could not be downloaded from file:.* \(invalid hash value"):
        resolve_checkpoint("torchvision/resnet18")
    served.unlink()
    with pytest.raises(
        UserError, match=r"could not be downloaded .*; without a network, copy the file to .*checkpoints"
    ):
        resolve_checkpoint("torchvision/resnet18")
    assert not list(torchvision_cache.iterdir())


TIMM = {"architecture": "resnet50", "num_classes": 2, "pretrained_cfg": {"input_size": [3, 224, 224]}}


def timms(**changes: object) -> dict:
    return {**TIMM, "pretrained_cfg": {**TIMM["pretrained_cfg"], **changes}}


TRANSFORMERS = {"model_type": "resnet", "id2label": {"0": "a", "1": "b"}}


@pytest.mark.parametrize(
    ("config", "processor", "message"),
    [
        ({**TIMM, "architecture": "resnet50d"}, {}, "timm's resnet50d is not one of resnet18"),
        ({**TIMM, "architecture": "resnetaa50"}, {}, "timm's resnetaa50 is not one of"),  # the same tensor names
        (timms(input_size=[1, 28, 28]), {}, "made for images of 1 × 28 × 28, not RGB squares"),
        (timms(crop_mode="squash"), {}, "timm's mode squash"),
        (timms(interpolation="lanczos"), {}, "resized by 'lanczos', which is not bilinear or bicubic"),
        (timms(std=[1, 0, 1]), {}, r"config\.json cannot be read \(ValueError: mean"),
        (timms(mean=["x"]), {}, r"config\.json cannot be read \(ValueError"),
        (timms(input_size=None), {}, r"config\.json cannot be read \(TypeError"),
        ({**TRANSFORMERS, "hidden_act": "gelu"}, {}, "hidden_act is gelu, unlike torchvision's ResNets"),
        ({**TRANSFORMERS, "downsample_in_bottleneck": True}, {}, "downsample_in_bottleneck is True"),
        (TRANSFORMERS, {"size": {"height": 224, "width": 224}}, "made for images resized to .* without a crop"),
        (TRANSFORMERS, {"size": {"shortest_edge": 384}}, "made for images resized to 384 px without a crop"),
        (TRANSFORMERS, {"resample": 1}, "resized by 'another', which is not"),
        (TRANSFORMERS, {"size": "big"}, r"config\.json cannot be read \(TypeError"),
    ],
)
def test_a_network_or_preprocessing_that_is_not_implemented_is_an_error(
    config: dict, processor: dict, message: str, tmp_path: Path
):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match=message) as error:
        resolve_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
