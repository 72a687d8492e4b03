"""ResNet.save_pretrained and push_to_hub: from_pretrained of the result is the same model."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image

from resnet_in1k import ResNet
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.utils.errors import UserError

PREPROCESSING = EvalPreprocessing(image_size=48, resize_size=53, interpolation="bicubic", std=(0.2, 0.3, 0.4))


def make(num_classes: int, class_names: list[str] | None) -> ResNet:
    torch.manual_seed(0)
    model = ResNet("resnet18", num_classes=num_classes).eval()
    model.class_names, model.preprocessing = class_names, PREPROCESSING
    return model


def assert_same(ours: ResNet, theirs: ResNet, photograph: np.ndarray) -> None:
    assert (ours.class_names, ours.preprocessing) == (theirs.class_names, theirs.preprocessing)
    picture = Image.fromarray(photograph)
    assert ours.predict(picture) == theirs.predict(picture)


NAMED = ["ant", "Bär | $x$", "猫"]


@pytest.mark.parametrize(("num_classes", "class_names"), [(3, NAMED), (3, None), (1000, None)])
def test_what_was_saved_is_loaded(num_classes: int, class_names: list[str] | None, photographs, tmp_path: Path):
    model = make(num_classes, class_names)
    model.save_pretrained(tmp_path / "saved", license="mit")
    again = ResNet.from_pretrained(tmp_path / "saved")
    assert_same(again, model, photographs[0])
    again.save_pretrained(tmp_path / "saved")  # in place of the first
    assert_same(ResNet.from_pretrained(tmp_path / "saved"), model, photographs[0])


def test_imagenets_names_stay(photographs, tmp_path: Path):
    model = make(1000, timm.data.ImageNetInfo().label_descriptions())
    model.save_pretrained(tmp_path)
    again = ResNet.from_pretrained(tmp_path)
    assert again.class_names[0] == "tench"
    again.save_pretrained(tmp_path / "again")
    assert_same(ResNet.from_pretrained(tmp_path / "again"), again, photographs[0])


def test_the_card_is_ours_and_timm_loads_the_folder(tmp_path: Path):
    model = make(3, NAMED)
    model.save_pretrained(tmp_path, repo_id="me/tiny", license="mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    assert 'ResNet.from_pretrained("me/tiny")' in card.text
    assert "More Information Needed" not in card.text
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(theirs(images), model(images))
    assert theirs.pretrained_cfg["label_names"] == NAMED


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in the client
def test_what_was_pushed_is_loaded(hub: HubServer, photographs: list[np.ndarray]):
    model = make(3, NAMED)
    model.push_to_hub("me/tiny", license="mit")
    assert {"README.md", "config.json", "model.safetensors"} <= hub.repos["me/tiny"].blobs("main").keys()
    assert_same(ResNet.from_pretrained("me/tiny"), model, photographs[0])


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.* cannot be read or written"):
        make(3, None).save_pretrained(tmp_path / "file/saved")
