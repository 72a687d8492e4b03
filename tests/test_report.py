"""Against scikit-learn, and against what was worked by hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion
from test_training import EvalOptions, evaluate_checkpoint

from resnet_in1k.evaluation import NO_CLASS, Verdicts
from resnet_in1k.report import calibration_error, confused_pairs, confusion_matrix, worst_mistakes
from resnet_in1k.run_folder import RunFolder


@pytest.fixture
def verdicts() -> Verdicts:
    """200 images of 7 classes, one of them unreadable."""
    generator = np.random.default_rng(0)
    top_ids = np.stack([generator.permutation(7)[:5] for _ in range(200)])
    confidences = generator.uniform(0.2, 1, 200).astype(np.float32)
    labels = generator.integers(0, 7, 200)
    top_ids[3], confidences[3] = NO_CLASS, 0
    return Verdicts(labels, top_ids, confidences)


def test_the_confusion_matrix_is_scikit_learns(verdicts: Verdicts):
    read = verdicts.top_ids[:, 0] != NO_CLASS
    expected = sklearn_confusion(verdicts.labels[read], verdicts.top_ids[read, 0], labels=range(7))
    assert np.array_equal(confusion_matrix(verdicts, 7), expected)


def test_confused_pairs_are_the_most_frequent_mistakes():
    confusion = np.array([[9, 1, 0], [5, 9, 2], [0, 3, 9]])
    pairs = confused_pairs(confusion, ["a", "b", "c"])
    assert pairs == [("b", "a", 5), ("c", "b", 3), ("b", "c", 2), ("a", "b", 1)]
    assert len(confused_pairs(np.ones((50, 50), dtype=int), [str(number) for number in range(50)])) == 20


def test_calibration_error_by_hand():
    """Two bins in use: 2 images at 0.95 of which 1 is right, 2 at 0.55 of which 2 are: (2·0.45 + 2·0.45) / 4."""
    verdicts = Verdicts(
        labels=np.array([0, 0, 1, 1]),
        top_ids=np.array([[0], [1], [1], [1]]),
        confidences=np.array([0.95, 0.95, 0.55, 0.55], dtype=np.float32),
    )
    assert calibration_error(verdicts) == pytest.approx(0.45, abs=1e-6)
    sure = Verdicts(np.array([0, 1]), np.array([[0], [1]]), np.ones(2, dtype=np.float32))
    assert calibration_error(sure) == pytest.approx(0, abs=1e-6)


def test_the_worst_mistakes_come_first(verdicts: Verdicts):
    places = worst_mistakes(verdicts)
    assert len(places) == 20
    assert all(verdicts.top_ids[place, 0] != verdicts.labels[place] for place in places)
    assert 3 not in places
    wrong = (verdicts.top_ids[:, 0] != verdicts.labels) & (verdicts.top_ids[:, 0] != NO_CLASS)
    assert verdicts.confidences[places].tolist() == sorted(verdicts.confidences[wrong], reverse=True)[:20]


def test_evaluating_with_a_report_writes_it_from_the_one_pass(finished: RunFolder, tmp_path: Path, capsys):
    folder = tmp_path / "a/report"
    evaluation = evaluate_checkpoint(EvalOptions(ckpt=str(finished.path), report=folder))
    assert "reproduced: the recorded eval.json has the same counts" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "per_class.csv").open()))
    assert [row["class"] for row in rows] == ["ant", "bee", "cat", "dog", "eel", "fox"]
    assert sum(int(row["top1_correct"]) for row in rows) == evaluation.top1_correct
    assert [int(row["num_images"]) for row in rows] == [2] * 6
    mistakes = sum(int(row["num_images"]) for row in csv.DictReader((folder / "confused_pairs.csv").open()))
    assert mistakes == 12 - evaluation.top1_correct
    facts = json.loads((folder / "report.json").read_text())
    assert 0 <= facts["expected_calibration_error"] <= 1
    for name in ("worst_mistakes.png", "confusion_matrix.png"):
        assert min(Image.open(folder / name).size) > 200


def test_other_numbers_than_recorded_are_told(finished: RunFolder, tmp_path: Path, capsys):
    import shutil

    copy = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    recorded = json.loads(copy.evaluation.read_text())
    copy.evaluation.write_text(json.dumps(recorded | {"top1_correct": recorded["top1_correct"] + 1}))
    evaluate_checkpoint(EvalOptions(ckpt=str(copy.path)))
    assert f"not reproduced: top1_correct {recorded['top1_correct'] + 1} there, " in capsys.readouterr().out
    evaluate_checkpoint(EvalOptions(ckpt=str(copy.path), image_size=48))
    said = capsys.readouterr().out
    assert (
        "not comparable to the recorded eval.json: image_size 32 there, 48 here; resize_size 36 there, 54 here" in said
    )
