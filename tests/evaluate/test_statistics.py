"""McNemar's test, calculated by hand."""

import base64

import numpy as np
import pytest

from resnet_in1k.evaluate.statistics import describe_paired, paired


def result(right: list[int], images: str = "ab") -> dict:
    bits = base64.b64encode(np.packbits(np.array(right, dtype=bool))).decode()
    return {"images_sha256": images, "top1_right": bits, "num_images": len(right), "top1_correct": sum(right)}


def test_mcnemar_by_hand():
    """Ten images differ, nine of which the second has right: 2 × (1 + 10) / 2^10 = 0.021."""
    first, second = [1] * 5 + [1] + [0] * 9 + [0] * 6, [1] * 5 + [0] + [1] * 9 + [0] * 6
    found = paired(result(first), result(second))
    assert found == (1, 9)
    assert describe_paired(found, "a", "b") == (
        "only a is right on 1 image, only b on 9: the difference is statistically significant (p = 0.021)"
    )
    assert describe_paired((2, 3), "a", "b").endswith("the difference is not statistically significant (p = 1)")


def test_equal_accuracies_have_no_significance():
    assert describe_paired((2, 2), "a", "b") == "only a is right on 2 images, only b on 2: both have the same accuracy"
    assert describe_paired((0, 0), "a", "b") == "a and b: both are right on the same images"


def test_different_images_are_not_compared():
    """The hash of the content counts where both record one."""
    assert paired(result([1, 0]), result([1, 0], images="cd")) is None
    assert paired({"num_images": 2}, result([1, 0])) is None
    copies = {**result([1, 0]), "samples_sha256": "cd"}
    assert paired(result([1, 0]), copies) is not None
    assert paired({**result([1, 0]), "samples_sha256": "ef"}, copies) is None


def test_bits_that_contradict_the_counts_are_an_error():
    with pytest.raises(ValueError, match="top1_right has 2 correct images, and top1_correct is 1"):
        paired(result([1, 1]) | {"top1_correct": 1}, result([1, 0]))
    with pytest.raises(ValueError, match=r"base64|padding|data"):
        paired(result([1, 1]) | {"top1_right": "?"}, result([1, 0]))
