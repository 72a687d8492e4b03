"""Top-1 and top-k accuracy: counts by NumPy, and as a metric of Hugging Face's `evaluate`."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import evaluate


def top_k_counts(top_ids: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Count correct predictions; the keys are fields of Evaluation.

    Args:
        top_ids: (N, k) integers, the k most probable classes, best first.
        labels: (N,) integers, the true classes.
    """
    hits = top_ids == labels[:, None]  # (N, k)
    counted = {"num_images": slice(None), "top1_correct": hits[:, 0], "topk_correct": hits.any(axis=1)}
    by_class = {name: np.bincount(labels[rows], minlength=num_classes).tolist() for name, rows in counted.items()}
    totals = {name: sum(counts) for name, counts in by_class.items()}
    return totals | {f"class_{name}": tuple(counts) for name, counts in by_class.items()}


def top_k_accuracy(k: int, num_classes: int) -> "evaluate.Metric":
    """Return a metric that needs no network; `evaluate.load("accuracy")` does, and has no top-k.

    Predictions are class ids, (N, k), best first; references are true class ids, (N,). `compute` returns the counts of
    `top_k_counts`, and the fractions `top1_accuracy` and `topk_accuracy`.
    """
    import datasets  # takes seconds, as `evaluate` does; training needs neither

    with _not_importable("transformers"):
        import evaluate

    class TopKAccuracy(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            ids = datasets.Value("int32")
            return evaluate.MetricInfo(
                description=f"Top-1 and top-{k} accuracy.",
                citation="",
                features=datasets.Features({"predictions": datasets.Sequence(ids, length=k), "references": ids}),
            )

        def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, Any]:
            counts = top_k_counts(np.asarray(predictions), np.asarray(references), num_classes)
            fractions = {f"{top}_accuracy": counts[f"{top}_correct"] / counts["num_images"] for top in ("top1", "topk")}
            return counts | fractions

    # It makes a cache folder even for values in memory, and the home folder may be read-only.
    with tempfile.TemporaryDirectory() as unused:
        return TopKAccuracy(keep_in_memory=True, cache_dir=unused)


@contextlib.contextmanager
def _not_importable(name: str) -> Iterator[None]:
    """Make `import name` raise ImportError in the body, unless the package has been imported before.

    Where transformers is installed, `evaluate` imports it: seconds and a gigabyte for what is not used here.
    """
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if sys.modules[name] is None:
            del sys.modules[name]
