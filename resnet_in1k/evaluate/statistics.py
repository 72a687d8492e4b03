"""How sure an accuracy is, and the difference of two that were measured on the same images."""

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np


def confidence_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, https://doi.org/10.1080/01621459.1927.10502953."""
    z = 1.959964
    share, spread = correct / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return middle - half, middle + half


@dataclass(frozen=True)
class Paired:
    """Counts of images that two models classify, and whether the difference could be chance."""

    only_first: int
    """Right by the first model, wrong by the second."""
    only_second: int
    p_value: float
    """Of McNemar's exact test (https://doi.org/10.1007/BF02295996): how probable so unequal counts, or more unequal
    ones, are if either model is as likely to be the one that is right."""

    def describe(self, first: str, second: str) -> str:
        chance = f"p = {self.p_value:.2g} (McNemar)"
        verdict = "could be chance" if self.p_value > 0.05 else "is hardly chance"
        return (
            f"{self.only_first:,} images only {first} has right, {self.only_second:,} only {second}: the difference "
            f"{verdict}, {chance}"
        )


def paired(first: dict[str, Any], second: dict[str, Any]) -> Paired | None:
    """From two eval.json; None if they are not known to be of the same images, or do not say which were right.

    Raises:
        ValueError: if they say it in a way that cannot be read.
    """
    from scipy.stats import binomtest

    if not first.get("images_sha256") or first["images_sha256"] != second.get("images_sha256"):
        return None
    if not same_samples(first, second):
        return None
    a, b = (_right(result) for result in (first, second))
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return Paired(only_first, only_second, p_value)


def same_samples(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two eval.json are of images with the same content, as far as both say."""
    here, there = first.get("samples_sha256"), second.get("samples_sha256")
    return not here or not there or here == there


def _right(result: dict[str, Any]) -> np.ndarray:
    """(N,) bool."""
    packed = np.frombuffer(base64.b64decode(result["top1_right"], validate=True), dtype=np.uint8)
    bits = np.unpackbits(packed)[: result["num_images"]].astype(bool)
    if bits.sum() != result["top1_correct"]:
        raise ValueError(f"{bits.sum()} images are marked as right, and {result['top1_correct']} are counted")
    return bits
