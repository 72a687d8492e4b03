"""cli/evaluate.py, called in this process."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.model.resnet import load_model
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import sha256_of


@pytest.fixture
def weights(evaluated: RunFolder, tmp_path: Path) -> Path:
    """A weights file of its own."""
    return Path(shutil.copy(evaluated.weights, tmp_path / "weights.safetensors"))


@pytest.fixture
def run(evaluated: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy to change."""
    return RunFolder(Path(shutil.copytree(evaluated.path, tmp_path / "run")))


def test_weights_outside_a_run_are_evaluated_on_the_given_data(weights: Path, image_folder: Path, tmp_path: Path):
    output = tmp_path / "result.json"
    evaluation = evaluate(
        EvalOptions(ckpt=str(weights), data=str(image_folder), split="train", image_size=32, workers=0, output=output)
    )
    result = json.loads(output.read_text())
    assert result["top1_accuracy"] == evaluation.counts["top1_correct"] / 37
    assert result["num_images"] == 37
    assert (result["image_size"], result["resize_size"], result["interpolation"]) == (32, 36, "bilinear")
    assert (result["split"], result["data"]) == ("train", str(image_folder))
    assert result["weights_sha256"] == sha256_of(weights)
    assert result["class_num_images"] == [7, 6, 6, 6, 6, 6]


def test_a_test_split_is_evaluated_by_its_name_and_one_class_is_refused(
    evaluated: RunFolder, image_folder: Path, tmp_path: Path, capsys
):
    data = Path(shutil.copytree(image_folder, tmp_path / "data"))
    (data / "val").rename(data / "Test")
    (data / "LICENSE").write_text("")
    output = tmp_path / "result.json"
    evaluation = evaluate(EvalOptions(ckpt=str(evaluated.path), data=str(data), split="test", workers=0, output=output))
    recorded, result = (json.loads(path.read_text()) for path in (evaluated.evaluation, output))
    assert evaluation.counts["top1_correct"] == recorded["top1_correct"]
    assert (result["split"], recorded["split"]) == ("test", "val")
    assert f"{data}/test: 12 images" in capsys.readouterr().out
    for name in ("ant", "bee", "cat", "dog", "eel"):
        shutil.rmtree(data / "Test" / name)
    with pytest.raises(UserError, match="one class only, fox"):
        evaluate(EvalOptions(ckpt=str(evaluated.path), data=str(data), split="test", workers=0))


def test_a_recorded_evaluation_is_reproduced_and_reported(evaluated: RunFolder, tmp_path: Path, capsys):
    evaluation = evaluate(EvalOptions(ckpt=str(evaluated.path), workers=1, batch_size=5, report=tmp_path / "report"))
    out = capsys.readouterr().out
    assert "reproduced: the recorded eval.json has the same counts\nbalanced accuracy " in out
    rows = list(csv.DictReader((tmp_path / "report/per_class.csv").open()))
    assert [row["class"] for row in rows] == ["ant", "bee", "cat", "dog", "eel", "fox"]
    assert sum(int(row["top1_correct"]) for row in rows) == evaluation.counts["top1_correct"]
    mistakes = sum(int(row["num_images"]) for row in csv.DictReader((tmp_path / "report/confused_pairs.csv").open()))
    assert mistakes == 12 - evaluation.counts["top1_correct"]


def test_a_result_that_differs_from_the_recorded_one_says_why(run: RunFolder, capsys):
    evaluation = evaluate(EvalOptions(ckpt=str(run.path), image_size=48, workers=0))
    assert evaluation.preprocessing == EvalPreprocessing(48, 54)
    conditions = "image_size 32 there, 48 here; resize_size 36 there, 54 here"
    assert f"not comparable to the recorded eval.json: {conditions}" in capsys.readouterr().out
    recorded = json.loads(run.evaluation.read_text())
    run.evaluation.write_text(json.dumps(recorded | {"top1_correct": recorded["top1_correct"] + 1}))
    evaluate(EvalOptions(ckpt=str(run.path), workers=0))
    assert f"not reproduced: top1_correct {recorded['top1_correct'] + 1} there, " in capsys.readouterr().out


def test_other_weights_than_those_recorded_are_noticed(run: RunFolder, capsys, caplog):
    data = bytearray(run.weights.read_bytes())
    data[-1] ^= 1
    run.weights.write_bytes(data)
    evaluate(EvalOptions(ckpt=str(run.path), workers=0))
    problem = "is not the file that eval.json was measured on: it was replaced or is damaged"
    assert [record.getMessage() for record in caplog.records] == [f"{run.weights} {problem}"]
    assert "reproduced" not in capsys.readouterr().out


def test_unreadable_images_are_counted_as_wrong_and_listed(evaluated: RunFolder, image_folder: Path, tmp_path, capsys):
    data = Path(shutil.copytree(image_folder, tmp_path / "dirty"))
    bad = [data / "val" / name / "0.jpg" for name in ("ant", "fox")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    evaluation = evaluate(EvalOptions(ckpt=str(evaluated.path), data=str(data), workers=1))
    assert [Path(name) for name in evaluation.bad_images] == bad
    out = capsys.readouterr().out
    assert "12 images, 2 unreadable, counted as wrong" in out
    assert f"counted as wrong: {bad[0]} (" in out
    assert "not comparable to the recorded eval.json: num_bad_images 0 there, 2 here; data" in out


def test_resized_copies_are_not_taken_for_the_recorded_images(
    evaluated: RunFolder, image_folder: Path, tmp_path: Path, capsys
):
    """They have the same names. The same images in another folder are the same."""
    data = Path(shutil.copytree(image_folder, tmp_path / "copies"))
    evaluate(EvalOptions(ckpt=str(evaluated.path), data=str(data), workers=0))
    assert "reproduced: the recorded eval.json has the same counts" in capsys.readouterr().out
    for path in (data / "val").rglob("*.jpg"):
        with Image.open(path) as picture:
            picture.reduce(2).save(path)
    evaluate(EvalOptions(ckpt=str(evaluated.path), data=str(data), workers=0))
    out = capsys.readouterr().out
    assert "not comparable to the recorded eval.json: data images with the same names and different content" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "no such folder"),
        ({"data": "digits", "output": Path("no/such/folder.json")}, "--output no/such/folder.json: no folder no/such"),
        ({"data": "digits", "report": Path(__file__)}, "--report .* is a file, not a folder"),
        ({"data": "digits", "batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"data": "digits", "image_size": 0}, "--image-size 0"),
        ({"data": "digits", "eval_crop_ratio": 1.5}, "--eval-crop-ratio 1.5: must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_evaluated_is_named(weights: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        evaluate(EvalOptions(ckpt=str(weights), **options))


def test_other_normalization_and_interpolation_than_recorded(evaluated: RunFolder, tmp_path: Path):
    """Each changes the loss, and is recorded."""
    output, losses = tmp_path / "result.json", set()
    for changes in ({}, {"mean": (0.5, 0.4, 0.3)}, {"std": (0.5, 0.4, 0.3)}, {"eval_interpolation": "bicubic"}):
        losses.add(evaluate(EvalOptions(ckpt=str(evaluated.path), workers=0, output=output, **changes)).loss)
        result = json.loads(output.read_text())
        assert result["mean"] == list(changes.get("mean", (0.485, 0.456, 0.406)))
        assert result["std"] == list(changes.get("std", (0.229, 0.224, 0.225)))
        assert result["interpolation"] == changes.get("eval_interpolation", "bilinear")
    assert len(losses) == 4


def test_a_part_of_the_classes_is_evaluated_by_their_logits_alone(
    evaluated: RunFolder, image_folder: Path, tmp_path, capsys
):
    """Compared with the model's logits of two classes, counted by hand."""
    for name in ("bee", "fox"):
        shutil.copytree(image_folder / "val" / name, tmp_path / "val" / name)
    part = evaluate(EvalOptions(ckpt=str(evaluated.path), data=str(tmp_path), workers=0))
    assert "only 2 of the model's 6 classes are in the data" in capsys.readouterr().out
    assert (part.counts["num_images"], part.source.class_names) == (4, ("bee", "fox"))
    model, preprocessing, correct = load_model(evaluated.weights).eval(), part.preprocessing, 0
    for label, name in enumerate(part.source.class_names):
        for file in (tmp_path / "val" / name).iterdir():
            image = preprocessing.square(np.fromfile(file, dtype=np.uint8))
            with torch.inference_mode():
                logits = model(normalize(torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)))
            correct += int(logits[0, [1, 5]].argmax() == label)
    assert part.counts["top1_correct"] == correct
