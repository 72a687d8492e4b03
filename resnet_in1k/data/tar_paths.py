"""Which files the shards of a split are: of a folder, or of a pattern as `glob` and WebDataset write it."""

import glob
import itertools
import os
import re
from pathlib import Path

from resnet_in1k.data.dataset import Split
from resnet_in1k.data.tar_plan import check_complete
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation", "valid")}
MAX_EXPANDED = 100_000
"""Names that braces stand for."""
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def is_pattern(place: str) -> bool:
    """Also the name of one file; but a folder may have such signs in its name."""
    signs = glob.has_magic(place) or "{split}" in place or "{" in place
    return os.path.isfile(place) or (bool(signs) and not os.path.isdir(place))


def has_splits(place: str) -> bool:
    """Whether it can name a training and a val split."""
    return not is_pattern(place) or "{split}" in place


def shards_of_split(place: str, split: Split) -> list[Path]:
    """`place/train/*.tar`, or `place/*.tar` with the word `train` in their names, not as in `retrained`; or what a
    pattern names with `train` for `{split}`. Sorted.

    Raises:
        UserError: if the pattern does not say where the two splits differ, or if shards are missing.
    """
    if not has_splits(place):
        raise UserError(f"shards:{place}: the pattern needs {{split}} where the names of train and val differ")
    for name in SPLIT_NAMES[split]:
        if is_pattern(place):
            found = _matching(place.replace("{split}", name))
        else:
            found = _in_folder(f"{place}/{name}") or _in_folder(place, re.compile(rf"(?<![a-z]){name}(?![a-z])", re.I))
        if found:
            return found
    return []


def shards_of_whole(place: str) -> list[Path]:
    """What `--val-share` divides: the shards of the training split, else all of the folder or pattern."""
    if training := has_splits(place) and shards_of_split(place, "train"):
        return training
    return _matching(place) if is_pattern(place) else _in_folder(place)


def _in_folder(place: str, word: re.Pattern[str] | None = None) -> list[Path]:
    """Those with this in their names.

    Raises:
        UserError: if not all are there that prepare_data.py has written or is still to write.
    """
    found = [Path(path) for path in sorted(glob.glob(f"{glob.escape(place)}/*.tar"))]
    if found := [path for path in found if word is None or word.search(path.name)]:
        check_complete(found[0].parent)
    return found


def _matching(pattern: str) -> list[Path]:
    """Raises UserError if nothing is there for one of the names that braces stand for."""
    names = expand_braces(pattern)
    found = {name: glob.glob(name) for name in names}
    missing = [name for name in names if not found[name]]
    if missing and len(missing) < len(names):
        raise UserError(f"{pattern}: {len(missing):,} of {len(names):,} are missing: {shorten(missing)}")
    paths = sorted(map(Path, set(itertools.chain(*found.values()))))
    if os.path.basename(pattern) == "*.tar":
        for folder in {path.parent for path in paths}:
            check_complete(folder)
    return paths


def expand_braces(pattern: str) -> list[str]:
    """`a-{00..02}.tar` to a-00.tar, a-01.tar, a-02.tar, and `{a,b}.tar` to a.tar, b.tar, as Bash does; `{split}` stays.

    Raises:
        UserError: if there are more than MAX_EXPANDED, or braces of another form.
    """
    match = _BRACES.search(pattern)
    if "{" in _BRACES.sub("", pattern.replace("{split}", "")):
        raise UserError(f"{pattern}: braces are for {{000..123}}, {{a,b}} and {{split}}, not within one another")
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is not None:
        choices = words.split(",")
    else:
        padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        choices = [f"{number:0{width}d}" for number in numbers[: MAX_EXPANDED + 1]]
    rest = expand_braces(pattern[match.end() :])
    if len(choices) * len(rest) > MAX_EXPANDED:
        raise UserError(f"{pattern}: stands for more than {MAX_EXPANDED:,} names")
    return [pattern[: match.start()] + choice + end for choice in choices for end in rest]
