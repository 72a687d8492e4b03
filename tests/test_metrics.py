import numpy as np
import pytest
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from resnet_in1k.metrics import TopKAccuracy


def test_by_hand():
    metric = TopKAccuracy(k=3)
    metric.add_batch(predictions=[[4, 1, 2], [0, 3, 1]], references=[4, 1])  # first; third
    metric.add_batch(predictions=[[2, 0, 1]], references=[3])  # not among them
    assert metric.compute() == {
        "top1_correct": 1,
        "topk_correct": 2,
        "num_images": 3,
        "top1_accuracy": 1 / 3,
        "topk_accuracy": 2 / 3,
    }


@pytest.mark.parametrize("k", [2, 5])
def test_against_scikit_learn(k: int):
    """accuracy_score is what `evaluate`'s own accuracy metric computes."""
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(500, 10)), generator.integers(0, 10, 500)
    ranked = np.argsort(-scores, axis=1)[:, :k]
    metric = TopKAccuracy(k=k)
    for start in range(0, 500, 128):  # 128 does not divide 500
        metric.add_batch(predictions=ranked[start : start + 128], references=labels[start : start + 128])
    result = metric.compute()
    assert result["num_images"] == 500
    assert result["top1_accuracy"] == accuracy_score(labels, ranked[:, 0])
    assert result["topk_accuracy"] == top_k_accuracy_score(labels, scores, k=k)
