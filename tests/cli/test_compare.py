"""scripts/compare.py, without the script."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from resnet_in1k.cli.compare import CompareOptions, compare
from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError


@pytest.fixture
def other(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A run with the images 0, 1 and 2 of 12 right, which differs from any network that predicts one class."""
    copied = shutil.copytree(finished.path, tmp_path / "$other$", ignore=shutil.ignore_patterns("checkpoints"))
    folder = RunFolder(Path(copied))
    facts, result = (json.loads(path.read_text()) for path in (finished.recipe, finished.evaluation))
    facts["recipe"] |= {"epochs": 1, "lr": 0.01}
    facts["init_from"] = {"checkpoint": "timm/resnet18.a1_in1k", "sha256": "00"}
    folder.recipe.write_text(json.dumps(facts))
    right = base64.b64encode(np.packbits(np.arange(12) < 3)).decode()
    result |= {"top1_correct": 3, "top1_accuracy": 0.25, "top1_right": right}
    folder.evaluation.write_text(json.dumps(result))
    return folder


def test_two_runs_on_the_same_images(finished: RunFolder, other: RunFolder, tmp_path: Path):
    picture = tmp_path / "compared.svg"
    text = compare(CompareOptions(items=(str(finished.path), str(other.path)), picture=picture))
    _, first, second, *rest = text.splitlines()
    for line, folder in ((first, finished), (second, other)):
        recorded = json.loads(folder.evaluation.read_text())
        assert line.split()[:2] == [folder.path.name, f"{recorded['top1_accuracy']:.2%}"]
        rates = sorted(record["images_per_second"] for record in folder.records() if record["kind"] == "train")
        assert float(line.split()[-1].replace(",", "")) == pytest.approx(
            sum(rates[len(rates) // 2 - 1 :][:2]) / 2, abs=1
        )
    changes = "epochs 2 → 1; lr 0.002 → 0.01; started from random weights → timm/resnet18.a1_in1k"
    assert f"  $other$: {changes}" in rest
    right = [json.loads(folder.evaluation.read_text())["top1_correct"] for folder in (finished, other)]
    pair = rest[rest.index("image by image:") + 1]
    only = [int(number) for number in re.findall(r" on (\d+)", pair)] or [0, 0]  # both may be right on the same images
    assert only[0] - only[1] == right[0] - right[1]
    assert picture.read_text().count("<path") > 10
    assert text.endswith(f"figure written to {picture}")


def test_evaluations_of_files_and_of_other_images(finished: RunFolder, image_folder: Path, tmp_path: Path):
    weights = shutil.copy(finished.weights, tmp_path / "mine.safetensors")
    how = {"ckpt": weights, "data": str(image_folder), "image_size": 32, "workers": 0}
    for split in ("val", "train"):
        evaluate(EvalOptions(**how, split=split, output=tmp_path / f"{split}.json"))
    text = compare(CompareOptions(items=(str(finished.path), str(tmp_path / "val.json"))))
    assert "finished and val: both are right on the same images" in text
    assert text.splitlines()[2].split()[-2:] == ["–", "–"]  # neither time nor speed is known
    text = compare(CompareOptions(items=(str(tmp_path / "val.json"), str(tmp_path / "train.json"))))
    assert "image by image: not comparable; the images differ" in text


def test_an_item_that_cannot_be_compared_is_named(finished: RunFolder, tmp_path: Path):
    alone = shutil.copy(finished.weights, tmp_path / "mine.safetensors")
    (tmp_path / "no.json").write_text("{}")
    for items, message in [
        ((str(finished.path),), "nothing to compare; name at least two"),
        ((str(finished.path), "nowhere"), "nowhere: no such file or folder"),
        ((str(finished.path), alone), r"mine.safetensors has no eval.json of its own: python scripts/evaluate.py"),
        ((str(finished.path), str(tmp_path / "no.json")), r"no.json is not an evaluation; evaluate.py --output"),
    ]:
        with pytest.raises(UserError, match=message):
            compare(CompareOptions(items=items))
    with pytest.raises(UserError, match=r"--picture x.pdf: must end in"):
        CompareOptions(items=("a", "b"), picture=Path("x.pdf"))
