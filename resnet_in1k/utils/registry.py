"""Looking up a recipe's choice in a table of functions."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from resnet_in1k.utils.errors import UserError

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, field: str) -> T:
    """Raises UserError with all names, and the nearest one, if the table has no such name."""
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(name, table, n=1)
    meant = f"; perhaps you meant {nearest[0]}" if nearest else ""
    raise UserError(f"--{field.replace('_', '-')} {name}: must be one of {', '.join(sorted(table))}{meant}")
