"""Checks of values that a user gives: the range of a field, and names of registered functions."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from resnet_in1k.utils.errors import UserError

T = TypeVar("T")
Metadata = dict[str, tuple[str, Callable[[Any], bool]]]
"""For `dataclasses.field(metadata=...)`: the allowed range as text, and its test."""


def at_least(low: float) -> Metadata:
    return {"range": (f"at least {low:g}", lambda value: value >= low)}


def above(low: float, at_most: float | None = None) -> Metadata:
    allowed = f"above {low:g}" if at_most is None else f"above {low:g}, at most {at_most:g}"
    return {"range": (allowed, lambda value: value > low and (at_most is None or value <= at_most))}


def between(low: float, high: float) -> Metadata:
    """Range that includes both ends."""
    return {"range": (f"between {low:g} and {high:g}", lambda value: low <= value <= high)}


def at_least_and_below(low: float, high: float) -> Metadata:
    return {"range": (f"at least {low:g} and below {high:g}", lambda value: low <= value < high)}


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
    """Return the entry of that name.

    Raises:
        UserError: if there is none, with all names and the nearest one.
    """
    if name in registry:
        return registry[name]
    nearest = difflib.get_close_matches(name, registry, n=1)
    suggestion = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"--{field.replace('_', '-')} {name}: must be one of {', '.join(sorted(registry))}{suggestion}")
