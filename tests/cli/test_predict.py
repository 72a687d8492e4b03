"""cli/predict.py, called in this process."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image

from resnet_in1k.cli.predict import Prediction, PredictOptions, predict
from resnet_in1k.model.resnet import load_model
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def predictions(ckpt: Path, *images: Path, **options: object) -> list[Prediction]:
    return predict(PredictOptions(ckpt=str(ckpt), images=images, **options), report=lambda text: None)


def test_against_a_plain_torchvision_loop(evaluated: RunFolder, image_folder: Path):
    """Pillow, torchvision's transforms, one image at a time; resized pixels may differ by a gray level."""
    model = load_model(evaluated.weights).eval()
    transform = v1.Compose([v1.Resize(36), v1.CenterCrop(32), v1.ToTensor()])
    normalize = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    found = predictions(evaluated.path, image_folder / "val", top_k=6, batch_size=5, workers=2)
    assert [Path(p["file"]).relative_to(image_folder / "val") for p in found] == [
        Path(name, f"{number}.jpg") for name in NAMES for number in range(2)
    ]
    for prediction in found:
        with torch.inference_mode():
            image = normalize(transform(Image.open(prediction["file"]).convert("RGB")))
            expected = model(image[None]).softmax(dim=1)[0].numpy()
        ours = {each["name"]: each["probability"] for each in prediction["predictions"]}
        assert sum(ours.values()) == pytest.approx(1, abs=1e-5)
        assert [ours[name] for name in NAMES] == pytest.approx(expected, abs=0.02)
        shares = [each["probability"] for each in prediction["predictions"]]
        assert shares == sorted(shares, reverse=True)


def test_unreadable_files_are_reported_in_their_place_after_which_it_fails(
    evaluated: RunFolder, image_folder: Path, tmp_path: Path
):
    for name, kind in [("a", "PNG"), ("b.jpg", "WEBP"), ("c.tif", "TIFF"), ("d.gif", "GIF")]:
        Image.open(image_folder / "val/ant/0.jpg").save(tmp_path / name, format=kind)
    (tmp_path / "broken.jpg").write_bytes((image_folder / "val/ant/0.jpg").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    printed: list[str] = []
    options = PredictOptions(
        ckpt=str(evaluated.path),
        images=(tmp_path / "nowhere.jpg", tmp_path, image_folder / "val/fox/0.jpg"),
        json=True,
        top_k=2,
        batch_size=2,
    )
    with pytest.raises(UserError, match=r"4 of 9 images cannot be read: .*nowhere.jpg \(No such file or directory\)"):
        predict(options, report=printed.append)
    lines = [json.loads(line) for line in printed]
    names = ["nowhere.jpg", "a", "b.jpg", "broken.jpg", "c.tif", "d.gif", "gone.jpg", "text.jpg", "0.jpg"]
    assert [Path(line["file"]).name for line in lines] == names
    assert [line.get("error", "")[:12] for line in lines] == [
        "No such file", "", "", lines[3]["error"][:12], "", "", "No such file", "no known ima", "",
    ]  # fmt: skip
    assert "truncated" in lines[3]["error"].lower()
    assert all(len(line["predictions"]) == 2 for line in lines if "error" not in line)
    single = predictions(evaluated.path, image_folder / "val/fox/0.jpg")[0]
    assert [each["name"] for each in lines[-1]["predictions"]] == [each["name"] for each in single["predictions"][:2]]


def test_photographs_in_a_folder_that_are_not_decoded_are_counted(evaluated: RunFolder, image_folder: Path, tmp_path):
    shutil.copy(image_folder / "val/ant/0.jpg", tmp_path / "b.jpg")
    for name in ("a.heic", "c.JXL"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" if "heic" in name else b"\xff\x0a" + bytes(20))
    with pytest.raises(UserError, match=r"2 of 3 images .* read: .*a\.heic \(HEIC is not decoded; convert"):
        predictions(evaluated.path, tmp_path)


def test_a_figure_shows_the_images(evaluated: RunFolder, image_folder: Path, tmp_path: Path):
    folders = [image_folder / "val" / name for name in NAMES[:1]]
    predictions(evaluated.path, *folders, picture=tmp_path / "figure.png")
    picture = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000  # photographs, not an empty page


def test_classes_without_names_are_numbered(evaluated: RunFolder, image_folder: Path, tmp_path: Path):
    shutil.copy(evaluated.weights, tmp_path / "weights.safetensors")
    (found,) = predictions(tmp_path / "weights.safetensors", image_folder / "val/ant/0.jpg", image_size=32)
    assert {each["name"] for each in found["predictions"]} < {f"class {number}" for number in range(6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ()}, "no image given"),
        ({"top_k": 0}, "--top-k 0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"picture": Path("a.txt")}, "--picture a.txt: must end in .png or .svg"),
        ({"image_size": 0}, "--image-size 0"),
        ({"eval_crop_ratio": 2.0}, "--eval-crop-ratio 2.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        PredictOptions(**{"ckpt": "runs/demo", "images": (Path("a.jpg"),), **options})
