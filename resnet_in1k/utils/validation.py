"""Values that a user gives, and their checks: the range of a field, names of registered functions."""

import dataclasses
import difflib
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from resnet_in1k.utils.errors import UserError

T = TypeVar("T")
OnBadImage = Literal["fail", "skip"]
"""What training does with an image that cannot be read."""
PrecisionFlag = Literal["auto", "fp32", "bf16", "fp16"]
PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
PRECISION_FLAGS: dict[str | None, PrecisionFlag] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
"""Descriptions and values of --precision by Accelerate's names, which recipe.json records as mixed_precision."""
COMPARISONS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def within(**limits: float) -> dict[str, Any]:
    """Return metadata of a dataclass field for numbers within limits, by the names in COMPARISONS."""
    allowed = " and ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in limits.items())
    return {"range": (allowed, lambda value: all(COMPARISONS[name](value, limits[name]) for name in limits))}


def invalid_fields(instance: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (field, allowed values, value) for each dataclass field with another value. None is always allowed."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            yield field.name, f"one of {', '.join(get_args(field.type))}", value
        if "range" not in field.metadata or value is None:
            continue
        allowed, holds = field.metadata["range"]
        for each in value if isinstance(value, tuple) else (value,):
            if not (math.isfinite(each) and holds(each)):
                yield field.name, allowed, each


def check_options(options: Any) -> None:
    """Raise UserError for the first option that is out of range, by the name of its flag."""
    for name, allowed, value in invalid_fields(options):
        raise UserError(f"--{name.replace('_', '-')} {value}: must be {allowed}")


def lookup(registry: Mapping[str, T], name: str, field: str) -> T:
    """Return the entry of that name. Raises UserError with all names and the nearest one if there is none."""
    if name in registry:
        return registry[name]
    nearest = difflib.get_close_matches(name, registry, n=1)
    suggestion = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"--{field.replace('_', '-')} {name}: must be one of {', '.join(sorted(registry))}{suggestion}")
