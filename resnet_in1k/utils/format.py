"""Numbers, lists and errors as short text."""

import re
from collections.abc import Sequence

# C0, DEL and C1; line and paragraph separators; marks that reorder their neighbors; halves of characters.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def count(number: int, noun: str, plural: str = "s") -> str:
    """Return `1 process`, `2 processes`."""
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def printable(text: str) -> str:
    """Escape control characters, which a file from elsewhere could use to write anything to a terminal.

    Joiners, spaces of all kinds and characters newer than this Python stay: names consist of them.
    """
    return _CONTROL.sub(lambda each: each[0].encode("unicode_escape").decode("ascii"), text)


def shorten(names: Sequence[str], at_most: int = 3) -> str:
    """Return the first names, and the number of the others."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


def duration(seconds: float) -> str:
    """Return a time in two units: 40 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    for size, unit, smaller, smaller_unit in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            units, rest = divmod(round(seconds / smaller), size // smaller)
            return f"{units} {unit} {rest} {smaller_unit}"
    return f"{seconds:.0f} s"


def file_size(num_bytes: float) -> str:
    """Return a size in decimal units: 512 MB, 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
