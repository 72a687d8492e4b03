"""The top-k metric, worked by hand and against scikit-learn."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.processes import ROOT
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

from resnet_in1k.evaluate.metrics import TopKAccuracy


def test_by_hand():
    metric = TopKAccuracy(k=3, num_classes=6)
    metric.add_batch(predictions=[[4, 1, 2], [0, 3, 1]], references=[4, 1])  # first; third
    metric.add_batch(predictions=[[2, 0, 1], [-1, -1, -1]], references=[4, 3])  # not among them; unreadable
    assert metric.compute() == {
        "num_images": 4,
        "top1_correct": 1,
        "topk_correct": 2,
        "top1_accuracy": 1 / 4,
        "topk_accuracy": 2 / 4,
        "class_num_images": [0, 1, 0, 1, 2, 0],
        "class_top1_correct": [0, 0, 0, 0, 1, 0],
        "class_topk_correct": [0, 1, 0, 0, 1, 0],
    }


@pytest.mark.parametrize("k", [2, 5])
def test_against_scikit_learn(k: int):
    """accuracy_score is what `evaluate`'s own accuracy metric computes."""
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(500, 10)), generator.integers(0, 10, 500)
    ranked = np.argsort(-scores, axis=1)[:, :k]
    metric = TopKAccuracy(k=k, num_classes=10)
    for start in range(0, 500, 128):  # 128 does not divide 500
        metric.add_batch(predictions=ranked[start : start + 128], references=labels[start : start + 128])
    result = metric.compute()
    assert result["num_images"] == 500
    assert result["top1_accuracy"] == accuracy_score(labels, ranked[:, 0])
    assert result["topk_accuracy"] == top_k_accuracy_score(labels, scores, k=k)
    confusion = confusion_matrix(labels, ranked[:, 0])
    assert result["class_num_images"] == confusion.sum(axis=1).tolist()
    assert result["class_top1_correct"] == confusion.diagonal().tolist()
    assert sum(result["class_topk_correct"]) == result["topk_correct"]


@pytest.mark.slow
def test_it_needs_no_home_to_write_to():
    """As in a container with a read-only home, and for a user without one."""
    code = """
from resnet_in1k.evaluate.metrics import TopKAccuracy
metric = TopKAccuracy(1, 2)
metric.add_batch(predictions=[[1], [0]], references=[1, 1])
print(metric.compute()["top1_correct"])
"""
    nowhere = {"HOME": "/proc/nowhere", "HF_HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **nowhere}
    )
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr
