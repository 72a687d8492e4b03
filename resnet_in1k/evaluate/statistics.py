"""Confidence intervals, and comparison of two evaluations: their conditions, counts and images."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_in1k.utils import imagenet
from resnet_in1k.utils.format import count, printable

COMPARED_CONDITIONS = dict.fromkeys(("split", "num_images", "num_classes", "image_size", "resize_size")) | {
    "num_bad_images": 0,
    "interpolation": "bilinear",
    "mean": imagenet.MEAN,
    "std": imagenet.STD,
}
"""Keys of eval.json that must be equal, and their values in files that were written before the key existed."""


def confidence_interval(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion, https://doi.org/10.1080/01621459.1927.10502953."""
    from scipy.stats import binomtest  # takes a second

    return tuple(binomtest(correct, total).proportion_ci(method="wilson"))


@dataclass(frozen=True)
class Paired:
    """Images on which only one of two models is right."""

    only_first: int
    only_second: int
    p_value: float
    """McNemar's exact test, https://doi.org/10.1007/BF02295996."""

    def describe(self, first: str, second: str) -> str:
        if not self.only_first + self.only_second:
            return f"{first} and {second}: both are right on the same images"
        verdict = "is not" if self.p_value > 0.05 else "is"
        return (
            f"only {first} is right on {count(self.only_first, 'image')}, only {second} on {self.only_second:,}: the "
            f"difference {verdict} statistically significant (p = {self.p_value:.2g})"
        )


def paired(first: dict[str, Any], second: dict[str, Any]) -> Paired | None:
    """Compare two eval.json image by image; None if their images are not known to be the same.

    Raises ValueError, KeyError or TypeError if an eval.json is invalid.
    """
    from scipy.stats import binomtest

    images = first.get("images_sha256")
    if not images or images != second.get("images_sha256") or not same_samples(first, second):
        return None
    a, b = (_is_right(result) for result in (first, second))
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    differing = only_first + only_second
    return Paired(only_first, only_second, float(binomtest(only_first, differing).pvalue) if differing else 1.0)


def same_samples(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return False if the content of the images is recorded for both, and differs."""
    hashes = first.get("samples_sha256"), second.get("samples_sha256")
    return not all(hashes) or hashes[0] == hashes[1]


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
        {
            **{name: _comparable(values.get(name, default)) for name, default in COMPARED_CONDITIONS.items()},
            "data": printable(Path(str(values.get("data"))).name),
        }
        for values in (result, recorded)
    )
    images = result.get("images_sha256"), recorded.get("images_sha256")
    if all(images):  # hashes of the images' names are more reliable than the folder's name
        then["data"] = now["data"] if images[0] == images[1] else "different images"
        if images[0] == images[1] and not same_samples(result, recorded):
            then["data"] = "images with the same names and different content, such as resized copies,"
    return "; ".join(f"{name} {then[name]} there, {now[name]} here" for name in now if then[name] != now[name])


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)  # JSON has no tuples
    return printable(value) if isinstance(value, str) else value


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
    text = f"{name} published top-1 {top1:.2%}"
    if different := different_conditions(result, published):
        return f"{text}; not comparable: {different}"
    images = paired(result, published)
    return f"{text}: here {distance(result, 100 * top1)}" + (f"; {images.describe('this run', name)}" if images else "")


def distance(result: dict[str, Any], published_percent: float) -> str:
    """Describe top-1 with its 95% interval, and its distance in percentage points from a published value."""
    points = 100 * result["top1_accuracy"] - published_percent
    low, high = confidence_interval(result["top1_correct"], result["num_images"])
    compared = "the same" if abs(points) < 0.005 else f"{abs(points):.2f} points {'higher' if points > 0 else 'lower'}"
    return f"{result['top1_accuracy']:.2%}, {compared} (95% interval {low:.2%} to {high:.2%})"
