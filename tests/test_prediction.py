import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image

from resnet_in1k.errors import UserError
from resnet_in1k.model import load_model
from resnet_in1k.prediction import Prediction, PredictOptions, predict
from resnet_in1k.run_folder import RunFolder

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def predictions(ckpt: Path, *images: Path, **options: object) -> list[Prediction]:
    return predict(PredictOptions(ckpt=str(ckpt), images=images, **options), say=lambda text: None)


def test_against_a_plain_torchvision_loop(finished: RunFolder, image_folder: Path):
    """PIL, torchvision's transforms, one image at a time; resized pixels may differ by a grey level."""
    model = load_model(finished.path / "model.safetensors").eval()
    transform = v1.Compose([v1.Resize(36), v1.CenterCrop(32), v1.ToTensor()])
    normalise = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    found = predictions(finished.path, image_folder / "val", top_k=6, batch_size=5)
    assert [Path(p.file).name for p in found] == ["0.jpg", "1.jpg"] * 6
    for prediction in found:
        with torch.inference_mode():
            image = normalise(transform(Image.open(prediction.file).convert("RGB")))
            expected = model(image[None]).softmax(dim=1)[0].numpy()
        ours = {name: share for _, name, share in prediction.classes}
        assert sum(ours.values()) == pytest.approx(1, abs=1e-5)
        assert [ours[name] for name in NAMES] == pytest.approx(expected, abs=0.02)
        shares = [share for _, _, share in prediction.classes]
        assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("how", [{"batch_size": 1}, {"workers": 2, "batch_size": 5}])
def test_probabilities_do_not_hang_on_batch_size_or_workers(finished: RunFolder, image_folder: Path, how: dict):
    alone, together = (predictions(finished.path, image_folder / "val", **options) for options in ({}, how))
    for ours, theirs in zip(alone, together, strict=True):
        assert ours.file == theirs.file
        assert [share for _, _, share in ours.classes] == pytest.approx([s for _, _, s in theirs.classes], abs=1e-5)


def test_bad_files_are_told_and_the_rest_is_done(finished: RunFolder, image_folder: Path, tmp_path: Path):
    for name, kind in [("a", "PNG"), ("b.jpg", "WEBP"), ("c.tif", "TIFF"), ("d.gif", "GIF")]:
        Image.open(image_folder / "val/ant/0.jpg").save(tmp_path / name, format=kind)
    (tmp_path / "broken.jpg").write_bytes((image_folder / "val/ant/0.jpg").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    said: list[str] = []
    options = PredictOptions(
        ckpt=str(finished.path), images=(tmp_path, tmp_path / "nowhere.jpg"), json=True, top_k=2, batch_size=2
    )
    with pytest.raises(UserError, match=r"4 of 8 images cannot be read: .*broken.jpg"):
        predict(options, say=said.append)
    lines = {Path(line["file"]).name: line for line in map(json.loads, said)}
    assert list(lines) == ["a", "b.jpg", "broken.jpg", "c.tif", "d.gif", "gone.jpg", "text.jpg", "nowhere.jpg"]
    assert [name for name, line in lines.items() if "error" in line] == [
        "broken.jpg",
        "gone.jpg",
        "text.jpg",
        "nowhere.jpg",
    ]
    assert lines["nowhere.jpg"]["error"] == "No such file or directory"
    assert all(len(line["predictions"]) == 2 for line in lines.values() if "error" not in line)


def test_a_picture_of_what_was_seen(finished: RunFolder, image_folder: Path, tmp_path: Path):
    predictions(finished.path, image_folder / "val", picture=tmp_path / "seen.png")
    picture = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB"))
    assert picture.shape[0] > 500  # three rows
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000  # photographs, not an empty page


def test_weights_without_names_number_their_classes(finished: RunFolder, image_folder: Path, tmp_path: Path):
    shutil.copy(finished.weights, tmp_path / "weights.safetensors")
    (found,) = predictions(tmp_path / "weights.safetensors", image_folder / "val/ant/0.jpg", image_size=32)
    assert {name for _, name, _ in found.classes} < {f"class {number}" for number in range(6)}


def test_as_a_table():
    prediction = Prediction("a.jpg", (("n01440764", "tench", 0.9912), ("n01443537", "goldfish", 0.0088)))
    assert prediction.to_table() == "a.jpg\n   99.12%  tench\n    0.88%  goldfish"
    assert Prediction("b.jpg", error="cut off").to_table() == "b.jpg\n  cannot be read: cut off"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ()}, "no image given"),
        ({"top_k": 0}, "--top-k 0: at least 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"picture": Path("a.txt")}, "ends in .png or .svg"),
        ({"image_size": 0}, "--image-size 0"),
        ({"eval_crop_ratio": 2.0}, "--eval-crop-ratio 2.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        PredictOptions(**{"ckpt": "runs/demo", "images": (Path("a.jpg"),), **options})
