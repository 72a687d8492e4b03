"""Top-1 and top-k accuracy as a metric of Hugging Face's `evaluate` that needs no network."""

import sys

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

    Feed it ranked class ids, (B, k) integers, best first, with labels, (B,); `compute` gives

    - `top1_correct`, `topk_correct`, `num_images`: counts,
    - `top1_accuracy`, `topk_accuracy`: the counts over `num_images`, as fractions.

    `evaluate.load("accuracy")` would need the network and knows no top-k.
    """

    def __init__(self, k: int = 5):
        self.k = k
        super().__init__(keep_in_memory=True)

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

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]  # (N, k)
        num_images = len(hits)
        top1_correct, topk_correct = int(hits[:, 0].sum()), int(hits.any(axis=1).sum())
        return {
            "top1_correct": top1_correct,
            "topk_correct": topk_correct,
            "num_images": num_images,
            "top1_accuracy": top1_correct / num_images,
            "topk_accuracy": topk_correct / num_images,
        }
