"""Whether an evaluation gives the numbers that were published or recorded, and how far it is from them."""

from pathlib import Path
from typing import Any

from resnet_in1k.evaluate.statistics import confidence_interval, paired, same_samples
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.format import printable

CONDITIONS = (
    "split",
    "num_images",
    "num_bad_images",
    "num_classes",
    "image_size",
    "resize_size",
    "interpolation",
    "mean",
    "std",
)
"""What must be equal for two evaluations to be comparable, beside the data's name."""
EARLIER = {"num_bad_images": 0, "interpolation": "bilinear", "mean": imagenet.MEAN, "std": imagenet.STD}
"""Of evaluations made before these were recorded."""


def different_conditions(result: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Why two eval.json are not comparable, in words; "" if they are."""
    now, known = _conditions(result), _conditions(recorded)
    here, there = result.get("images_sha256"), recorded.get("images_sha256")
    if here and there:  # by the files' names: then that of their folder says nothing
        if here != there:
            known["data"] = "other images"
        elif not same_samples(result, recorded):
            known["data"] = "images of the same names but other content, such as resized copies,"
        else:
            known["data"] = now["data"]
    return "; ".join(f"{name} {known[name]} there, {now[name]} here" for name in now if known[name] != now[name])


def _conditions(result: dict[str, Any]) -> dict[str, Any]:
    values = {name: result.get(name, EARLIER.get(name)) for name in CONDITIONS}
    values["data"] = Path(str(result.get("data"))).name
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)  # as JSON has it
        elif isinstance(value, str):
            values[name] = printable(value)
    return values


def describe_reproduction(result: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Whether weights that are evaluated again give the recorded counts, in words."""
    if different := different_conditions(result, recorded):
        return f"not comparable to the recorded eval.json: {different}"
    counts = [(name, recorded.get(name), result[name]) for name in ("top1_correct", "top5_correct")]
    if different := [f"{name} {there} there, {here} here" for name, there, here in counts if there != here]:
        return (
            f"not reproduced: {'; '.join(different)}, by the recorded eval.json; other hardware may round differently"
        )
    return "reproduced: the recorded eval.json has the same counts"


def describe_distance(result: dict[str, Any], published: dict[str, Any], name: str) -> str:
    """How far a new training's evaluation is from a published one, in words.

    Raises:
        KeyError, TypeError, ValueError: if the published one is incomplete.
    """
    top1 = published["top1_correct"] / published["num_images"]
    text = f"{name} published top-1 {top1:.2%}"
    if different := different_conditions(result, published):
        return f"{text}; not comparable: {different}"
    text += f": here {distance(result, 100 * top1)}"
    images = paired(result, published)
    return f"{text}; {images.describe('this run', name)}" if images else text


def distance(result: dict[str, Any], published_percent: float) -> str:
    """In percentage points, with the interval that so many images leave."""
    difference = 100 * result["top1_accuracy"] - published_percent
    low, high = confidence_interval(result["top1_correct"], result["num_images"])
    compared = "the same" if abs(difference) < 0.005 else f"{abs(difference):.2f} points {_side(difference)}"
    return f"{result['top1_accuracy']:.2%}, {compared} (95 % interval {low:.2%} to {high:.2%})"


def _side(difference: float) -> str:
    return "higher" if difference > 0 else "lower"
