import base64

import numpy as np
import pytest

from resnet_in1k.evaluate.statistics import confidence_interval, paired


def test_confidence_interval():
    """8 of 10, calculated by hand: center (0.8 + 0.19207) / 1.38415, half width 0.22653."""
    low, high = confidence_interval(8, 10)
    assert (low, high) == (pytest.approx(0.49016, abs=1e-4), pytest.approx(0.94332, abs=1e-4))
    assert confidence_interval(10, 10)[1] == pytest.approx(1.0)


def result(right: list[int], images: str = "ab") -> dict:
    bits = base64.b64encode(np.packbits(np.array(right, dtype=bool))).decode()
    return {"images_sha256": images, "top1_right": bits, "num_images": len(right), "top1_correct": sum(right)}


def test_mcnemar_by_hand():
    """Ten images differ, nine of them for the second: 2 × (1 + 10) / 2^10."""
    first, second = [1] * 5 + [1] + [0] * 9 + [0] * 6, [1] * 5 + [0] + [1] * 9 + [0] * 6
    found = paired(result(first), result(second))
    assert (found.only_first, found.only_second) == (1, 9)
    assert found.p_value == pytest.approx(22 / 1024)
    assert found.describe("a", "b") == (
        "1 images only a has right, 9 only b: the difference is hardly chance, p = 0.021 (McNemar)"
    )
    assert paired(result(first), result(first)).p_value == 1
    copies = {**result(second), "samples_sha256": "cd"}
    assert paired(result(first), copies) == found  # an older one does not say what its images held
    assert paired({**result(first), "samples_sha256": "ef"}, copies) is None
    assert "could be chance" in paired(result([1, 0, 1]), result([0, 1, 1])).describe("a", "b")


def test_other_images_are_not_compared():
    assert paired(result([1, 0]), result([1, 0], images="cd")) is None
    assert paired({"num_images": 2}, result([1, 0])) is None


def test_bits_that_contradict_the_counts_are_an_error():
    with pytest.raises(ValueError, match="2 images are marked as right, and 1 are counted"):
        paired(result([1, 1]) | {"top1_correct": 1}, result([1, 0]))
    with pytest.raises(ValueError, match=r"base64|padding|data"):
        paired(result([1, 1]) | {"top1_right": "?"}, result([1, 0]))
