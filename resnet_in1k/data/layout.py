"""The layout of a folder of images: its splits and classes, and which other path fits if this one does not."""

import contextlib
import glob
import itertools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from resnet_in1k.data.dataset import SPLIT_NAMES, Split
from resnet_in1k.data.formats import LEFTOVERS, image_suffixes
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

LAYOUT = "images belong in DATA/train/<class>/ and DATA/val/<class>/"
NO_VAL_SPLIT = "for images without a val split give --val-share; to try without images, --data digits"
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz")
MOVE = (
    """cd {}; tr -d '\\r"' < {} | while IFS=$'\\t,' read -r f c _; do for i in "${{f%.*}}".*; do [ -f "$i" ] && """
    """mkdir -p "$c" && mv "$i" "$c"; done; done"""
)
"""Bash's command that moves images to folders of classes, by a table of names and classes."""


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder except hidden entries, which operating systems and editors create, but with LEFTOVERS."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".") or LEFTOVERS.fullmatch(entry.name)]


def _scan(folder: Path) -> tuple[list[Path], bool]:
    """Return the folders in a folder, and whether it holds images itself, by their suffixes."""
    with contextlib.suppress(OSError):
        entries = [each for each in visible(folder) if not LEFTOVERS.fullmatch(each.name)]
        folders = {each.name for each in entries if each.is_dir()}
        holds_images = any(each.name.lower().endswith(image_suffixes()) for each in entries if each.name not in folders)
        return [folder / name for name in sorted(folders)], holds_images
    return [], False


def _is_named(folder: Path, splits: Sequence[Split] = tuple(SPLIT_NAMES), as_word: bool = False) -> bool:
    """True for the name of a split, in any case, or a name with such a word, as seg_train."""
    words = "|".join(word for split in splits for word in SPLIT_NAMES.get(split, (re.escape(split.lower()),)))
    pattern = rf"(.*[^a-z])?({words})([^a-z].*)?" if as_word else words
    return re.fullmatch(pattern, folder.name.lower()) is not None


def find_split(root: Path, split: Split) -> Path | None:
    """Return the folder of a split, by its name in any case, else by a word of its name; for val also that of test.

    A folder with images next to other folders with images is a class, whatever its name.
    """
    folders, _ = _scan(root)
    has_classes = any(_scan(each)[1] for each in folders if not _is_named(each))
    for name, as_word in itertools.product(("val", "test") if split == "val" else (split,), (False, True)):
        for folder in folders:
            if _is_named(folder, [name], as_word) and not ((has_classes or as_word) and _scan(folder)[1]):
                return folder
    return None


def is_test(folder: Path) -> bool:
    return _is_named(folder, ["test"], as_word=True)


def class_root(split: Path) -> Path:
    """Return the folder of the class folders: the split's or, as in `train/images/<class>`, the only one in it."""
    inner, holds_images = _scan(split)
    return inner[0] if len(inner) == 1 and not holds_images and _has_classes(inner[0]) else split


def _has_classes(folder: Path) -> bool:
    """True if there are two folders with images or, unless they are named as splits, folders with images."""

    def is_class(each: Path) -> bool:
        inner, holds_images = _scan(each)
        return holds_images or (not _is_named(each) and any(_scan(first)[1] for first in inner[:1]))

    return len(list(itertools.islice(filter(is_class, _scan(folder)[0]), 2))) == 2


def advice(root: Path, split: Split = "train") -> str:
    """Return what to do instead of `--data root`: a folder near it that has splits or classes, or how to unpack it."""
    inner, holds_images = _scan(root)
    if inner and split not in ("train", "val"):
        return f"the folders there are {shorten([each.name for each in inner], 9)}"
    above = [root.parent] if _is_named(root) or holds_images else []
    near = [root, *above, *inner, *(each for folder in inner[:9] for each in _scan(folder)[0][:9])]
    splits = {each: [find_split(each, "train"), find_split(each, "val")] for each in near}
    for each in near:
        if all(split and _has_classes(class_root(split)) for split in splits[each]):
            as_split = f" (in evaluate.py with --split {root.name})" if each == root.parent else ""
            return f"give --data {shlex.quote(str(each))}{as_split}"
    places = [class_root(splits[each][0] or each) for each in near]
    found = [f"give --data {shlex.quote(str(place))} --val-share 0.2" for place in places if _has_classes(place)][:1]
    files = [root] if root.is_file() else sorted(root.glob("[!.]*.*"))
    if not inner and (archives := [path for path in files if path.suffix.lower() in ARCHIVES and path.is_file()]):
        suffix, module = archives[0].suffix, "zipfile" if archives[0].suffix == ".zip" else "tarfile"
        names = shlex.quote(str(root)) + ("" if root.is_file() else f"/*{suffix}")
        found.insert(0, f'unpack: for f in {names}; do python -m {module} -e "$f" "${{f%.*}}"; done')
    tables = [*files, *sorted(root.parent.glob("*.*"))] if holds_images else []
    for table in [path for path in tables if _has_labels(path, root)][:1]:
        found.append(f"move them by a table: {MOVE.format(shlex.quote(str(root)), shlex.quote(str(table.absolute())))}")
    return "; or ".join(found) or f"{LAYOUT}; {NO_VAL_SPLIT}"


def _has_labels(table: Path, folder: Path) -> bool:
    """True for a table of two columns that names an image of the folder in its second line."""
    with contextlib.suppress(OSError):
        if table.suffix.lower() in (".csv", ".tsv", ".txt"):
            lines = table.read_text(encoding="utf-8", errors="replace").splitlines()[1:2]
            fields = [each.strip('"') for line in lines for each in re.split("[,\t]", line)]
            return len(fields) == 2 and any(folder.glob(f"{glob.escape(Path(fields[0]).stem)}.*"))
    return False


def check_class_folders(folder: Path, class_names: Sequence[str]) -> None:
    """Raise UserError, with a path that fits, if these are not class folders: none, splits, or data with splits."""
    paths = [folder / name for name in class_names]
    if not paths:
        raise UserError(f"{folder}: no class folders in it; {advice(folder)}")
    if all(map(_is_named, paths)) or any(find_split(path, "train") and find_split(path, "val") for path in paths[:3]):
        raise UserError(f"{folder}: {shorten(class_names)} cannot be classes, but splits or data; {advice(folder)}")
