"""Image files: folders of classes, `train/<class>/*` and `val/<class>/*`, and lists of files for prediction.

Listing a million files takes minutes on network storage, so the listing of a folder is cached. The cache is used while
no folder in it has changed, which costs one request per folder instead of one per file.
"""

import contextlib
import os
import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from resnet_in1k.data.dataset import IMAGE_SUFFIXES, PackedBytes, Source, SourceFacts, Split, read_cache, write_cache
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

PARTIAL = ".partial."
"""Prefix of a class folder that prepare_data.py has not completed."""
LAYOUT = "images belong in DATA/train/<class>/ and DATA/val/<class>/"
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
    folder = Path(data, split)
    if not folder.is_dir():
        advice = "for images without a val split give --val-share; to try without images, --data digits"
        raise UserError(f"{folder}: no such folder; {LAYOUT}; {advice}")
    return _open(data, split, folder)


def open_whole(data: str) -> FileSource:
    """Open `train/<class>/*` or `<class>/*`; raises UserError if there is a val split."""
    root = Path(data)
    if (root / "val").is_dir():
        raise UserError(f"--val-share: {data} has a val split; omit --val-share, or give --data {root / 'train'}")
    return _open(data, "train", root / "train" if (root / "train").is_dir() else root)


def open_paths(paths: Sequence[Path]) -> FileSource:
    """Open image files, and the images in folders at any depth, in this order, with the label 0, for prediction.

    Raises:
        UserError: if a folder cannot be read or has no images. Files are not opened here.
    """
    images: list[str] = []
    for path in paths:
        with files.content_errors(path):
            found = sorted(images_below(path, str(path), ignored=[], stamps={})) if path.is_dir() else [str(path)]
        if not found:
            raise UserError(f"{path}: no images in this folder")
        images += found
    labels, keys = np.zeros(len(images), dtype=np.int64), PackedBytes(map(os.fsencode, images))
    return FileSource(name="images", split="val", class_names=("",), labels=labels, keys=keys, folder=Path())


def _open(data: str, split: Split, folder: Path) -> FileSource:
    started = time.time()
    try:
        listing = read_cache([folder])
        if listing is None or not _is_unchanged(folder, listing[0]["stamps"]):
            listing = facts, fields = _list(folder)
            # Each stamp is older than what was read of its folder, so a change while listing is seen the next time.
            if max(stamp[0] for stamp in facts["stamps"].values()) < (started - SETTLED_AFTER_SECONDS) * 1e9:
                write_cache([folder], facts, **fields)
    except OSError as error:
        reason = f"{error.strerror}; check its path and permissions"
        raise UserError(f"{error.filename or folder} cannot be read: {reason}") from None
    facts, fields = listing
    ignored, class_names = facts["ignored"], tuple(facts["class_names"])
    note = f"ignored in {folder}, not images by name or content: {shorten(ignored)}" if ignored else ""
    return FileSource(name=data, split=split, class_names=class_names, folder=folder, note=note, **fields)


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
        `class_names`, `ignored`, the files that are not images, and `stamps`, of all folders just before they are read;
        and the fields `keys` and `labels` of a FileSource. All paths are relative to the folder.
    """
    if next(folder.glob(f"{PARTIAL}*"), None):
        raise UserError(f"{folder} is incomplete: rerun the prepare_data.py command that was interrupted there")
    stamps, ignored, labels = {"": _stamp(folder)}, list[str](), list[int]()
    entries = sorted(_visible(folder), key=lambda entry: entry.name)
    class_names = [entry.name for entry in entries if entry.is_dir()]
    if others := [entry.name for entry in entries if not entry.is_dir()]:
        raise UserError(f"{folder}: files must be in a folder named for their class, not here: {shorten(others)}")
    if not class_names:
        raise UserError(f"{folder}: no class folders in it; {LAYOUT}")

    def paths() -> Iterator[bytes]:
        for label, name in enumerate(class_names):
            images = sorted(images_below(folder / name, name, ignored, stamps))
            if not images:
                raise UserError(f"{folder / name}: no images in this class; add some or remove the folder")
            labels.extend([label] * len(images))
            yield from map(os.fsencode, images)

    fields = {"keys": PackedBytes(paths()), "labels": np.array(labels, dtype=np.int64)}
    return {"class_names": class_names, "ignored": ignored, "stamps": stamps}, fields


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder except hidden entries, which operating systems and editors create."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def images_below(folder: Path, prefix: str, ignored: list[str], stamps: dict[str, list[int]]) -> list[str]:
    """Return paths of image files at any depth, with `prefix` in place of the folder.

    Other files are added to `ignored`; the folders, with their stamps, to `stamps`.
    """
    images: list[str] = []
    stamps[prefix] = _stamp(folder)
    for entry in _visible(folder):
        relative = f"{prefix}/{entry.name}"
        # A link with an image's suffix counts as an image: following a million links over a network takes minutes.
        if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir(follow_symlinks=False):
            images.append(relative)
        elif entry.is_dir():
            images += images_below(folder / entry.name, relative, ignored, stamps)
        elif _has_image_header(folder / entry.name):
            images.append(relative)
        else:
            ignored.append(relative)
    return images


def _has_image_header(path: Path) -> bool:
    with warnings.catch_warnings(), contextlib.suppress(ValueError, SyntaxError, Image.DecompressionBombError):
        warnings.simplefilter("ignore")
        try:
            Image.open(path).close()
        except OSError:
            return False
    return True  # also for a damaged image, which must be reported
