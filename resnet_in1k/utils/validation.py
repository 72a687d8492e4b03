"""Check values that a user gives: the range of a field, and names of registered functions."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from resnet_in1k.utils.errors import UserError

Metadata = dict[str, tuple[str, Callable[[Any], bool]]]
"""For `dataclasses.field(metadata=...)`: the range in words, and the test of it."""


def at_least(low: float) -> Metadata:
    return {"range": (f"at least {low:g}", lambda value: value >= low)}


def above(low: float, at_most: float | None = None) -> Metadata:
    words = f"above {low:g}" if at_most is None else f"above {low:g}, at most {at_most:g}"
    return {"range": (words, lambda value: value > low and (at_most is None or value <= at_most))}


def between(low: float, high: float) -> Metadata:
    """Both ends included."""
    return {"range": (f"between {low:g} and {high:g}", lambda value: low <= value <= high)}


def at_least_and_below(low: float, high: float) -> Metadata:
    return {"range": (f"at least {low:g} and below {high:g}", lambda value: low <= value < high)}


def out_of_range(instance: Any) -> Iterator[tuple[str, str, Any]]:
    """(field, range in words, value) of each field whose value is out of its range; None is in every range."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if "range" not in field.metadata or value is None:
            continue
        words, holds = field.metadata["range"]
        for each in value if isinstance(value, tuple) else (value,):
            if not (math.isfinite(each) and holds(each)):
                yield field.name, words, each


def check_options(options: Any) -> None:
    """Raises UserError for the first option that is out of range, by its flag's name."""
    for name, words, value in out_of_range(options):
        raise UserError(f"--{name.replace('_', '-')} {value}: must be {words}")


T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, field: str) -> T:
    """Raises UserError with all names, and the nearest one, if the table has no such name."""
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(name, table, n=1)
    meant = f"; perhaps you meant {nearest[0]}" if nearest else ""
    raise UserError(f"--{field.replace('_', '-')} {name}: must be one of {', '.join(sorted(table))}{meant}")
