"""The top-k counts and metric, calculated by hand."""

import os
import subprocess
import sys

import pytest
from helpers.processes import ROOT

from resnet_in1k.evaluate.metrics import top_k_metric


def test_by_hand():
    metric = top_k_metric(num_classes=6)
    metric.add_batch(predictions=[[4, 1, 2], [0, 3, 1]], references=[4, 1])  # first; third
    metric.add_batch(predictions=[[2, 0, 1], [-1, -1, -1]], references=[4, 3])  # not in the top 3; unreadable
    assert metric.compute() == {
        "top1_accuracy": 1 / 4,
        "top5_accuracy": 2 / 4,
        "num_images": 4,
        "top1_correct": 1,
        "top5_correct": 2,
        "num_classes": 6,
        "top_k": 3,
        "class_num_images": [0, 1, 0, 1, 2, 0],
        "class_top1_correct": [0, 0, 0, 0, 1, 0],
        "class_top5_correct": [0, 1, 0, 0, 1, 0],
    }


@pytest.mark.slow
def test_neither_a_home_folder_nor_transformers_is_needed():
    """Containers may have a read-only home; transformers takes seconds to import. Counts need no library but NumPy."""
    code = """
import sys
from resnet_in1k.evaluate.evaluation import evaluate_model
print(sorted({"evaluate", "datasets"} & sys.modules.keys()))
from resnet_in1k.evaluate.metrics import top_k_metric
print(top_k_metric(2).compute(predictions=[[1], [0]], references=[1, 1])["top1_correct"])
print("transformers" in sys.modules)
"""
    nowhere = {"HOME": "/proc/nowhere", "HF_HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **nowhere}
    )
    assert (result.returncode, result.stdout) == (0, "[]\n1\nFalse\n"), result.stderr
