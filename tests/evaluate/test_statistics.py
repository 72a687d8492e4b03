"""McNemar's and Welch's tests, calculated by hand and published."""

import base64
import warnings

import numpy as np
import pytest
from scipy.stats import t

from resnet_in1k.evaluate.statistics import describe_paired, paired, welch


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


def test_welch_of_a_published_example():
    """https://en.wikipedia.org/wiki/Welch's_t-test, example 3, ten times its values: p = 0.036, and 0.110 by
    Student's test, which takes the variances to be equal."""
    first = [198, 204, 196, 178, 185, 189, 183, 189, 195, 220]
    second = [282, 266, 201, 233, 252, 221, 177, 276, 206, 137, 232, 175, 206, 180, 239, 216, 243, 204, 240, 132]
    verdict = "the difference is statistically significant (Welch's t-test, p = 0.036)"
    assert welch(first, second, 1000) == f"-2.22 points, {verdict}"
    assert welch(second, first, 1000) == f"+2.22 points, {verdict}"


@pytest.mark.parametrize(
    ("first", "second"), [([3, 5], [9, 30]), ([700, 711, 704], [690, 701]), ([5, 5, 5], [4, 6, 9])]
)
def test_welch_by_its_formulas(first: list[int], second: list[int]):
    """Also of one group without variance, which scipy's ttest_ind warns about."""
    a, b = (np.var(counts, ddof=1) / len(counts) for counts in (first, second))
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    p_value = 2 * t.sf(abs(np.mean(first) - np.mean(second)) / np.sqrt(a + b), freedom)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f"(Welch's t-test, p = {p_value:.2g})" in welch(first, second, 1000)


def test_welch_without_any_variance():
    """The accuracies of 49,999 images have rounding errors, which must not pass for a variance."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other, points in ((37_000, "+0.00"), (36_000, "+2.00")):
            expected = f"{points} points; no test, because top-1 does not vary over the seeds of either"
            assert welch([37_000] * 3, [other] * 3, 49_999) == expected
