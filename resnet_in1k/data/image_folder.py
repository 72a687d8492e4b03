"""Image files: folders of classes, `train/<class>/*` and `val/<class>/*`, and lists of files for prediction.

Listing a million files takes minutes on network storage, so the listing of a folder is cached. The cache is used while
no folder in it has changed, which costs one request per folder instead of one per file.
"""

import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from resnet_in1k.data import formats, layout
from resnet_in1k.data.dataset import PackedBytes, Source, SourceFacts, Split, read_cache, write_cache
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count, shorten

PARTIAL = ".partial."
"""Prefix of a class folder that prepare_data.py has not completed."""
SETTLED_AFTER_SECONDS = 2.0
"""A folder that has just changed may change again within the same tick of its file system's clock."""


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """A source of image files; the keys are their paths relative to `folder`."""

    folder: Path

    def read(self, index: int) -> np.ndarray:
        # Not np.fromfile, which takes a read error for the end of the file. A bytearray, because torch warns about
        # memory that it cannot write to.
        with open(os.path.join(os.fsencode(self.folder), self.keys[index]), "rb", buffering=0) as file:
            return np.frombuffer(bytearray(file.readall()), dtype=np.uint8)

    def image_name(self, index: int) -> str:
        return str(Path(self.folder, os.fsdecode(self.keys[index])))


def facts(data: str) -> SourceFacts:
    name = Path(data).name or data
    return SourceFacts(name, shlex.quote(f"path/to/{name}"))


def open_split(data: str, split: Split) -> FileSource:
    """Open a split by the name of its folder, see `layout.find_split`; raises UserError with a path that would fit."""
    root = _root(data)
    folder = layout.find_split(root, split)
    if folder is None:
        raise UserError(f"{root / split}: no such folder; {layout.advice(root, split)}")
    classes = layout.class_root(folder)
    notes = [f"validation is on the folder {folder.name}"] if split == "val" and layout.is_test(folder) else []
    notes += [f"classes are the folders in {classes}"] if classes != folder else []
    source = _open(data, split, classes)
    return replace(source, note="; ".join([*notes, *filter(None, [source.note])]))


def open_whole(data: str) -> FileSource:
    """Open `train/<class>/*` or `<class>/*`; raises UserError if there is a val split."""
    root = _root(data)
    train, val = (layout.find_split(root, split) for split in ("train", "val"))
    if train and val and not layout.is_test(val):
        advice = f"omit --val-share, or give --data {shlex.quote(str(train))}"
        raise UserError(f"--val-share: {data} has a val split; {advice}")
    return _open(data, "train", train or root)


def _root(data: str) -> Path:
    root = Path(data)
    if root.is_file():
        raise UserError(f"{root} is a file, not a folder; {layout.advice(root)}")
    return root


def open_paths(paths: Sequence[Path]) -> FileSource:
    """Open image files, and the images in folders at any depth, in this order, with the label 0, for prediction.

    Raises:
        UserError: if a folder cannot be read or has no images. Files are not opened here.
    """
    images: list[str] = []
    for path in paths:
        with files.content_errors(path):
            others = list[str]()
            found = images_below(path, str(path), others, {}, []) if path.is_dir() else [str(path)]
            found = sorted([*found, *filter(formats.is_undecodable, others)])  # reported one by one
        if not found:
            raise UserError(f"{path}: no images in this folder")
        images += found
    labels, keys = np.zeros(len(images), dtype=np.int64), PackedBytes(map(os.fsencode, images))
    return FileSource(name="images", split="val", class_names=("",), labels=labels, keys=keys, folder=Path())


def _open(data: str, split: Split, folder: Path) -> FileSource:
    started = time.time()
    try:
        listing = read_cache([folder])
        same_formats = listing is not None and listing[0]["formats"] == formats.image_formats()
        if not same_formats or not _is_unchanged(folder, listing[0]["stamps"]):
            listing = facts, fields = _list(folder)
            # Each stamp is older than what was read of its folder, so a change while listing is seen the next time.
            if max(stamp[0] for stamp in facts["stamps"].values()) < (started - SETTLED_AFTER_SECONDS) * 1e9:
                write_cache([folder], facts, **fields)
    except OSError as error:
        reason = f"{error.strerror}; check its path and permissions"
        raise UserError(f"{error.filename or folder} cannot be read: {reason}") from None
    facts, fields = listing
    class_names, notes = facts["class_names"], facts["notes"]
    counts = np.bincount(fields["labels"], minlength=len(class_names))
    if empty := [class_names[label] for label in np.flatnonzero(counts == 0)]:
        notes = [f"no images in {folder} of {shorten(empty, 9)}", *notes]
        if split == "train":
            raise UserError("; ".join([*notes, "add some, or remove these class folders"]))
    note = "; ".join(notes)
    return FileSource(name=data, split=split, class_names=tuple(class_names), folder=folder, note=note, **fields)


def _stamp(folder: Path) -> list[int]:
    """Return the time of the last change in nanoseconds, the inode, the size and the number of links."""
    status = folder.stat()
    return [max(status.st_mtime_ns, status.st_ctime_ns), status.st_ino, status.st_size, status.st_nlink]


def _is_unchanged(folder: Path, stamps: dict[str, list[int]]) -> bool:
    with contextlib.suppress(OSError):
        return all(_stamp(folder / name) == stamp for name, stamp in stamps.items())
    return False


def _list(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """List a split's folder.

    Returns:
        `class_names`, `notes` on files that were passed over, `stamps` of all folders just before they are read, and
        `formats`, those that were known;
        and the fields `keys` and `labels` of a FileSource. All paths are relative to the folder.
    """
    if next(folder.glob(f"{PARTIAL}*"), None):
        raise UserError(f"{folder} is incomplete: rerun the prepare_data.py command that was interrupted there")
    stamps, links, labels = {"": _stamp(folder)}, list[str](), list[int]()
    entries = sorted(layout.visible(folder), key=lambda entry: entry.name)
    class_names = [entry.name for entry in entries if entry.is_dir() and not formats.LEFTOVERS.fullmatch(entry.name)]
    ignored = [entry.name for entry in entries if entry.name not in class_names]
    if flat := [name for name in ignored if not formats.LEFTOVERS.fullmatch(name) and formats.is_image(folder / name)]:
        here = f"files must be in a folder named for their class, not here: {shorten(flat)}"
        raise UserError(f"{folder}: {here}; {layout.advice(folder)}")
    layout.check_class_folders(folder, class_names)

    def paths() -> Iterator[bytes]:
        for label, name in enumerate(class_names):
            images = sorted(images_below(folder / name, name, ignored, stamps, links))
            labels.extend([label] * len(images))
            yield from map(os.fsencode, images)

    fields = {"keys": PackedBytes(paths()), "labels": np.array(labels, dtype=np.int64)}
    notes = list(_notes(folder, ignored))
    if not labels:
        raise UserError("; ".join([f"{folder}: no images in its class folders", *notes, layout.LAYOUT]))
    _check_links(folder, links)
    return {"class_names": class_names, "notes": notes, "stamps": stamps, "formats": formats.image_formats()}, fields


def _notes(folder: Path, ignored: Sequence[str]) -> Iterator[str]:
    """Describe the files and folders that were passed over."""
    leftovers = {name for name in ignored if formats.LEFTOVERS.fullmatch(name.rpartition("/")[2])}
    photographs = {name for name in ignored if formats.is_undecodable(name)} - leftovers
    if leftovers:
        yield f"passed over in {folder}, left by other programs: {shorten(sorted(leftovers))}"
    if photographs:
        yield f"passed over in {folder}, {formats.describe_undecodable(sorted(photographs))}"
    if others := sorted(set(ignored) - leftovers - photographs):
        yield f"ignored in {folder}, not images by name or content: {shorten(others)}"


def _check_links(folder: Path, links: Sequence[str]) -> None:
    """Raise UserError for links to files that are missing, as of DVC or git-annex."""

    def missing_of(names: Sequence[str]) -> list[str]:
        return [name for name in names if not os.path.exists(os.path.join(folder, name))]

    with ThreadPoolExecutor(32) as pool:  # for network storage, where each takes a moment
        parts = [links[start::64] for start in range(min(64, len(links)))]
        missing = sorted(name for part in pool.map(missing_of, parts) for name in part)
    if missing:
        named = f"{count(len(missing), 'image')}: {shorten(missing)}"
        raise UserError(f"{folder}: links to missing files, {named}; fetch the files, or remove the links")


def images_below(
    folder: Path, prefix: str, ignored: list[str], stamps: dict[str, list[int]], links: list[str]
) -> list[str]:
    """Return paths of image files at any depth, with `prefix` in place of the folder.

    Other files and leftovers are added to `ignored`; the folders, with their stamps, to `stamps`; images that are links
    to `links`. Raises UserError for a link to a folder that it is in.
    """
    images, suffixes = list[str](), formats.image_suffixes()
    stamps[prefix] = _stamp(folder)
    for entry in layout.visible(folder):
        relative = f"{prefix}/{entry.name}"
        if entry.name.startswith("."):  # a leftover
            ignored.append(relative)
        elif entry.name.lower().endswith(suffixes) and not entry.is_dir(follow_symlinks=False):
            images.append(relative)
            if entry.is_symlink():
                links.append(relative)
        elif formats.LEFTOVERS.fullmatch(entry.name):
            ignored.append(relative)
        elif entry.is_dir():
            path = folder.absolute() / entry.name
            if entry.is_symlink() and any(map(path.samefile, path.parents)):
                raise UserError(f"{folder / entry.name} is a link to a folder that it is in; remove the link")
            images += images_below(folder / entry.name, relative, ignored, stamps, links)
        elif formats.is_image(folder / entry.name):
            images.append(relative)
        else:
            ignored.append(relative)
    return images
