"""ResNet.from_pretrained and predict in another program."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import ROOT
from PIL import Image

from resnet_in1k import ResNet
from resnet_in1k.cli.predict import PredictOptions, predict
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError

OF_TRAINING = ["accelerate", "evaluate", "matplotlib", "jinja2", "psutil", "sklearn", "timm", "datasets"]


def test_predictions_are_those_of_the_script(finished: RunFolder, image_folder: Path):
    model = ResNet.from_pretrained(finished.path)
    files = sorted((image_folder / "val").rglob("*.jpg"))[:4]
    for expected in predict(PredictOptions(images=tuple(files), ckpt=str(finished.path), workers=0), lambda text: None):
        ours = model.predict(expected["file"], top_k=3)
        assert [name for name, _ in ours] == [each["name"] for each in expected["predictions"][:3]]
        assert [share for _, share in ours] == pytest.approx(
            [each["probability"] for each in expected["predictions"][:3]], abs=1e-5
        )
        assert model.predict(Image.open(expected["file"]), top_k=3) == ours


def test_predict_restores_the_mode_of_the_model(finished: RunFolder, photographs: list[np.ndarray]):
    model = ResNet.from_pretrained(finished.path)
    picture = Image.fromarray(photographs[0])
    before = model.predict(picture)
    assert not model.training
    model.train()
    assert model.predict(picture) == before
    assert model.training
    assert sum(share for _, share in model.predict(picture, top_k=99)) == pytest.approx(1)
    assert len(before) == 5


def test_preprocessing_is_that_of_the_weights(finished: RunFolder, tmp_path: Path):
    model = ResNet.from_pretrained(finished.path)
    assert (model.preprocessing.image_size, model.preprocessing.resize_size) == (32, 36)
    assert model.class_names == ["ant", "bee", "cat", "dog", "eel", "fox"]
    fresh = ResNet("resnet18", num_classes=2)
    assert (fresh.preprocessing.image_size, fresh.preprocessing.resize_size) == (224, 256)
    assert {name for name, _ in fresh.predict(Image.new("RGB", (60, 40)))} == {"class 0", "class 1"}


def test_an_unreadable_file_is_an_error_in_one_line(finished: RunFolder, tmp_path: Path):
    model = ResNet.from_pretrained(finished.path)
    (tmp_path / "text.jpg").write_text("no image")
    for file in (tmp_path / "text.jpg", tmp_path / "nowhere.jpg"):
        with pytest.raises(UserError, match=rf"{file.name} cannot be read \("):
            model.predict(file)


@pytest.mark.slow
def test_nothing_that_only_training_needs_is_imported(finished: RunFolder, image_folder: Path):
    """torch, torchvision, safetensors, huggingface-hub and their requirements are enough."""
    file = next((image_folder / "val").rglob("*.jpg"))
    code = f"""
import json, sys
sys.modules |= dict.fromkeys({[*OF_TRAINING, "transformers", "scipy", "IPython", "fcntl", "resource"]})
from resnet_in1k import ResNet
print(json.dumps(ResNet.from_pretrained({str(finished.path)!r}).predict({str(file)!r})))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    names = [name for name, _ in json.loads(result.stdout)]
    assert len(set(names) & {"ant", "bee", "cat", "dog", "eel", "fox"}) == 5
