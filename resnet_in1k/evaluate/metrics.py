"""Top-1 and top-k accuracy: by NumPy, and as a metric of Hugging Face's `evaluate`."""

import sys
import tempfile
from typing import Any

import numpy as np


def top_k_counts(top_ids: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Count correct predictions; return accuracies, and counts in total and by class, by their keys in eval.json.

    Args:
        top_ids: (N, k) integers, the k most probable classes, best first; k is 5, or less if there are fewer classes.
        labels: (N,) integers, the true classes.
    """
    hits = top_ids == labels[:, None]  # (N, k)
    counted = {"num_images": slice(None), "top1_correct": hits[:, 0], "top5_correct": hits.any(axis=1)}
    by_class = {name: np.bincount(labels[rows], minlength=num_classes).tolist() for name, rows in counted.items()}
    totals = {name: sum(counts) for name, counts in by_class.items()}
    return {
        "top1_accuracy": totals["top1_correct"] / len(labels),
        "top5_accuracy": totals["top5_correct"] / len(labels),
        **totals,
        "num_classes": num_classes,
        "top_k": top_ids.shape[1],
        **{f"class_{name}": counts for name, counts in by_class.items()},
    }


def compute_by_metric(top_ids: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Return `top_k_counts`, computed as a metric of Hugging Face's `evaluate`.

    The metric needs no network; `evaluate.load("accuracy")` does, and has no top-k.
    """
    import datasets  # takes seconds, as `evaluate` does; training needs neither

    # `evaluate` imports transformers where that is installed: seconds and a gigabyte, for nothing that is used here.
    sys.modules.setdefault("transformers", None)  # type: ignore[arg-type]
    import evaluate

    if sys.modules["transformers"] is None:
        del sys.modules["transformers"]

    class TopKAccuracy(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            ids = datasets.Value("int32")
            features = datasets.Features({"predictions": datasets.Sequence(ids), "references": ids})
            return evaluate.MetricInfo(description="Top-1 and top-k accuracy.", citation="", features=features)

        def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, Any]:
            return top_k_counts(np.asarray(predictions), np.asarray(references), num_classes)

    # It makes a cache folder even for values in memory, and the home folder may be read-only.
    with tempfile.TemporaryDirectory() as unused:
        metric = TopKAccuracy(keep_in_memory=True, cache_dir=unused)
        return metric.compute(predictions=top_ids, references=labels)
