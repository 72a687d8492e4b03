"""The top-k counts and metric, calculated by hand."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.processes import ROOT

from resnet_in1k.evaluate.metrics import compute_by_metric


def test_by_hand():
    top_ids = np.array([[4, 1, 2], [0, 3, 1], [2, 0, 1], [-1, -1, -1]])  # first; third; not in the top 3; unreadable
    assert compute_by_metric(top_ids, np.array([4, 1, 4, 3]), num_classes=6) == {
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
import numpy as np
from resnet_in1k.evaluate.evaluation import evaluate_model
print(sorted({"evaluate", "datasets"} & sys.modules.keys()))
from resnet_in1k.evaluate.metrics import compute_by_metric
print(compute_by_metric(np.array([[1], [0]]), np.array([1, 1]), 2)["top1_correct"])
print("transformers" in sys.modules)
"""
    nowhere = {"HOME": "/proc/nowhere", "HF_HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **nowhere}
    )
    assert (result.returncode, result.stdout) == (0, "[]\n1\nFalse\n"), result.stderr
