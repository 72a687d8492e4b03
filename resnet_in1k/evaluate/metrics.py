"""Top-1 and top-k accuracy as a metric of Hugging Face's `evaluate` that needs no network."""

import sys
import tempfile
from typing import Any

import datasets
import numpy as np

if "transformers" in sys.modules:
    import evaluate
else:  # where it is installed, evaluate imports it for pipelines of its own: seconds and a gigabyte in every process
    sys.modules["transformers"] = None  # type: ignore[assignment]
    import evaluate

    del sys.modules["transformers"]


class TopKAccuracy(evaluate.Metric):
    """How often the true class is the first, or among the first k, of those predicted.

    Takes ranked class ids, (B, k) integers, best first, with labels, (B,); `compute` gives

    - `top1_correct`, `topk_correct`, `num_images`: counts,
    - `top1_accuracy`, `topk_accuracy`: the counts over `num_images`, as fractions,
    - `class_num_images`, `class_top1_correct`, `class_topk_correct`: lists of counts by class.

    `evaluate.load("accuracy")` would need the network and knows no top-k.
    """

    def __init__(self, k: int, num_classes: int):
        self.k, self.num_classes = k, num_classes
        # evaluate makes its cache folder even if everything is kept in memory, and the home may be read-only.
        self._cache = tempfile.TemporaryDirectory()
        super().__init__(keep_in_memory=True, cache_dir=self._cache.name)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"Top-1 and top-{self.k} accuracy.",
            citation="",
            inputs_description="predictions: ranked class ids, best first; references: true class ids.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int32"), length=self.k),
                    "references": datasets.Value("int32"),
                }
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, Any]:
        labels = np.asarray(references)
        hits = np.asarray(predictions) == labels[:, None]  # (N, k)

        def by_class(chosen: np.ndarray) -> list[int]:
            return np.bincount(labels[chosen], minlength=self.num_classes).tolist()

        top1, topk = by_class(hits[:, 0]), by_class(hits.any(axis=1))
        return {
            "num_images": len(labels),
            "top1_correct": sum(top1),
            "topk_correct": sum(topk),
            "top1_accuracy": sum(top1) / len(labels),
            "topk_accuracy": sum(topk) / len(labels),
            "class_num_images": by_class(np.ones(len(labels), dtype=bool)),
            "class_top1_correct": top1,
            "class_topk_correct": topk,
        }
