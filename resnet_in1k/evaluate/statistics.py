"""Confidence intervals, and comparison of two evaluations: their conditions, counts and images."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from resnet_in1k.utils import imagenet
from resnet_in1k.utils.format import count, printable

ADDED_LATER = {"num_bad_images": 0, "interpolation": "bilinear", "mean": list(imagenet.MEAN), "std": list(imagenet.STD)}
"""Keys that eval.json did not have in earlier versions, with the values that they had."""
CONDITIONS = ("split", "num_images", "num_classes", "image_size", "resize_size", *ADDED_LATER)
"""Keys of eval.json that must be equal for two evaluations to be comparable."""


def confidence_interval(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion, https://doi.org/10.1080/01621459.1927.10502953."""
    from scipy.stats import binomtest  # takes a second

    return tuple(binomtest(correct, total).proportion_ci(method="wilson"))


def paired(first: dict[str, Any], second: dict[str, Any]) -> tuple[int, int] | None:
    """Return the number of images that only the first of two eval.json has right, and that only the second has.

    None if their images are not known to be the same. Raises ValueError, KeyError or TypeError if one is invalid.
    """
    if _difference_of_images(first, second) != "":
        return None
    a, b = (_is_right(result) for result in (first, second))
    return int((a & ~b).sum()), int((b & ~a).sum())


def describe_paired(counts: tuple[int, int], first: str, second: str) -> str:
    """Describe counts of `paired` with McNemar's exact test, https://doi.org/10.1007/BF02295996."""
    from scipy.stats import binomtest

    only_first, only_second = counts
    if not any(counts):
        return f"{first} and {second}: both are right on the same images"
    pair = f"only {first} is right on {count(only_first, 'image')}, only {second} on {only_second:,}"
    if only_first == only_second:
        return f"{pair}: both have the same accuracy"
    p_value = binomtest(only_first, only_first + only_second).pvalue
    return f"{pair}: {_verdict(p_value)} (p = {p_value:.2g})"


def _verdict(p_value: float) -> str:
    return f"the difference {'is not' if p_value > 0.05 else 'is'} statistically significant"


def welch(first: Sequence[int], second: Sequence[int], num_images: int) -> str:
    """Describe the difference of two averages of `top1_correct` with Welch's test, doi.org/10.1093/biomet/34.1-2.28."""
    from scipy.stats import ttest_ind_from_stats

    # Moments of integers are exact, so equal counts have deviation 0. scipy's ttest_ind warns about equal counts.
    (mean_1, std_1), (mean_2, std_2) = ((mean(counts), stdev(counts)) for counts in (first, second))
    points = f"{100 * (mean_1 - mean_2) / num_images:+.2f} points"
    if std_1 == std_2 == 0:
        return f"{points}; no test, because top-1 does not vary over the seeds of either"
    p_value = ttest_ind_from_stats(mean_1, std_1, len(first), mean_2, std_2, len(second), equal_var=False).pvalue
    return f"{points}, {_verdict(p_value)} (Welch's t-test, p = {p_value:.2g})"


def _difference_of_images(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Describe how the second's images differ; "" if they are the same, None if that is not recorded."""
    names, contents = ((first.get(key), second.get(key)) for key in ("images_sha256", "samples_sha256"))
    if not all(names):
        return None
    if names[0] != names[1]:
        return "different images"
    is_same = contents[0] == contents[1] or not all(contents)
    return "" if is_same else "images with the same names and different content, such as resized copies,"


def _is_right(result: dict[str, Any]) -> np.ndarray:
    """Return (N,) bool."""
    packed = np.frombuffer(base64.b64decode(result["top1_right"], validate=True), dtype=np.uint8)
    bits = np.unpackbits(packed)[: result["num_images"]].astype(bool)
    if bits.sum() != result["top1_correct"]:
        raise ValueError(f"top1_right has {bits.sum()} correct images, and top1_correct is {result['top1_correct']}")
    return bits


def different_conditions(result: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Name the conditions that make two eval.json incomparable; "" if there are none."""
    now, then = (
        {name: json.dumps(values.get(name, ADDED_LATER.get(name))) for name in CONDITIONS}  # equal for list and tuple
        | {"data": Path(str(values.get("data"))).name}
        for values in (result, recorded)
    )
    images = _difference_of_images(result, recorded)
    if images is not None:  # hashes are more reliable than the name of a folder
        then["data"] = images or now["data"]
    different = [f"{name} {then[name]} there, {now[name]} here" for name in now if then[name] != now[name]]
    return printable("; ".join(different))  # the recorded one may be from the Hub


def describe_reproduction(result: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Describe whether a second evaluation of the same weights gives the recorded counts."""
    if different := different_conditions(result, recorded):
        return f"not comparable to the recorded eval.json: {different}"
    counts = [(name, recorded.get(name), result[name]) for name in ("top1_correct", "top5_correct")]
    if different := "; ".join(f"{name} {there} there, {here} here" for name, there, here in counts if there != here):
        return f"not reproduced: {different}, by the recorded eval.json; different hardware may round differently"
    return "reproduced: the recorded eval.json has the same counts"


def describe_distance(result: dict[str, Any], published: dict[str, Any], name: str) -> str:
    """Describe how far a new run's evaluation is from a published one; raises as `paired`."""
    top1 = published["top1_correct"] / published["num_images"]
    if different := different_conditions(result, published):
        return f"{name} published top-1 {top1:.2%}; not comparable: {different}"
    text = f"{name} published top-1 {top1:.2%}: here {distance(result, 100 * top1)}"
    counts = paired(result, published)
    return f"{text}; {describe_paired(counts, 'this run', name)}" if counts else text


def distance(result: dict[str, Any], published_percent: float) -> str:
    """Describe top-1 with its 95% interval, and its distance in percentage points from a published value."""
    points = 100 * result["top1_accuracy"] - published_percent
    low, high = confidence_interval(result["top1_correct"], result["num_images"])
    compared = "the same" if abs(points) < 0.005 else f"{abs(points):.2f} points {'higher' if points > 0 else 'lower'}"
    return f"{result['top1_accuracy']:.2%}, {compared} (95% interval {low:.2%} to {high:.2%})"
