"""The numbers of a report, by hand; its files."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.loading import PREPROCESSING, packed_source
from PIL import Image

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import open_source
from resnet_in1k.evaluate.evaluation import NO_CLASS, Evaluation
from resnet_in1k.evaluate.report import calibration_error, confused_pairs, worst_mistakes, write_report


def test_confused_pairs_are_the_most_frequent_mistakes():
    confusion = np.array([[9, 1, 0], [5, 9, 2], [0, 3, 9]])
    pairs = confused_pairs(confusion, ["a", "b", "c"])
    assert pairs == [("b", "a", 5), ("c", "b", 3), ("b", "c", 2), ("a", "b", 1)]
    assert len(confused_pairs(np.ones((50, 50), dtype=int), [str(number) for number in range(50)])) == 20


def test_calibration_error_by_hand():
    """Two bins in use: 2 images at 0.95 of which 1 is right, 2 at 0.55 of which 2 are: (2·0.45 + 2·0.45) / 4."""
    confidences = np.array([0.95, 0.95, 0.55, 0.55], dtype=np.float32)
    assert calibration_error(np.array([True, False, True, True]), confidences) == pytest.approx(0.45, abs=1e-6)


def evaluation_of(top_ids: list[list[int]], confidences: list[float], source: Source) -> Evaluation:
    return Evaluation(source, PREPROCESSING, np.array(top_ids), np.array(confidences, dtype=np.float32), 1.0, {})


def test_worst_mistakes_are_the_most_confident_and_readable():
    """Of class 0: 30 images that are wrong, nine that are right, and one that is unreadable."""
    source = replace(packed_source([b""] * 40), labels=np.zeros(40, dtype=int))
    confidences = np.random.default_rng(0).uniform(0.2, 1, 40).tolist()
    places = worst_mistakes(evaluation_of([[1]] * 30 + [[0]] * 9 + [[NO_CLASS]], confidences, source))
    assert places == sorted(range(30), key=lambda place: -confidences[place])[:20]


@pytest.fixture
def three(image_folder: Path) -> Source:
    """Images of the classes 0, 1 and 2; there is none of class 3."""
    val = open_source(str(image_folder), "val")
    names = ("n01440764", "bee", "cat", "dog")
    return packed_source([val.read(index).tobytes() for index in range(3)], names)


def test_a_report_is_tables_numbers_and_figures(three: Source, tmp_path: Path):
    """Image 0 is right, image 1 is second, image 2 is neither."""
    folder = tmp_path / "a/report"
    write_report(evaluation_of([[0, 1], [2, 1], [3, 0]], [0.9, 0.8, 0.6], three), folder)
    rows = list(csv.reader((folder / "per_class.csv").open()))
    assert rows[1:] == [
        ["n01440764", "tench", "1", "1", "1", "1.0", "1.0", "1.0", "1.0", "1.0", "0"],
        ["bee", "bee", "1", "0", "1", "0.0", "1.0", "0.0", "0.0", "0.0", "1"],
        ["cat", "cat", "1", "0", "0", "0.0", "0.0", "0.0", "0.0", "0.0", "2"],
        ["dog", "dog", "0", "0", "0", "", "", "", "", "", "3"],
    ]
    assert list(csv.reader((folder / "confused_pairs.csv").open()))[1:] == [["bee", "cat", "1"], ["cat", "dog", "1"]]
    facts = json.loads((folder / "report.json").read_text())
    assert (facts["top1_accuracy"], facts["top5_accuracy"], facts["num_images"]) == (1 / 3, 2 / 3, 3)
    assert (facts["balanced_accuracy"], facts["macro_f1"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    # Each image in a bin of its own.
    assert facts["expected_calibration_error"] == pytest.approx((0.1 + 0.8 + 0.6) / 3, abs=1e-6)
    assert facts["mean_confidence"] == pytest.approx((0.9 + 0.8 + 0.6) / 3, abs=1e-6)
    for name in ("worst_mistakes.png", "confusion_matrix.png"):
        assert min(Image.open(folder / name).size) > 200

    write_report(evaluation_of([[0, 1], [1, 2], [2, 0]], [0.9, 0.8, 0.6], three), folder)  # again, without mistakes
    assert not (folder / "worst_mistakes.png").exists()
    assert list(csv.reader((folder / "confused_pairs.csv").open()))[1:] == []
