"""The files of a folder by class, kept between runs: listing a million of them takes minutes on network storage."""

import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_in1k.data.dataset import PackedBytes
from resnet_in1k.utils import files
from resnet_in1k.utils.files import cache_file

FORMAT_VERSION = 1
SETTLED_AFTER_SECONDS = 2.0
"""A folder that changed a moment ago may change again within the same tick of its file system's clock."""


class Listing(NamedTuple):
    """What was found below a split's folder."""

    class_names: list[str]
    counts: list[int]
    """Images of each class."""
    items: PackedBytes
    """Their paths, relative to the folder."""
    folders: dict[str, os.stat_result]
    """All folders that were read, relative to it, "" for itself, as they were just before; none if it was kept."""
    ignored: list[str]
    """Files that are no images, relative to it."""


def kept_listing(folder: Path, find: Callable[[], Listing]) -> Listing:
    """The listing that is kept, if no folder in it has changed since; else what `find` finds, which is then kept.

    Whether a folder has changed is told by its times, size and number of links: a call for each folder instead of one
    for each file.
    """
    file = _file_of(folder)
    listing = _read(file, folder)
    if listing is not None:
        return listing
    started = time.time()
    listing = find()
    stamps = _stamps(listing.folders.values())
    # The file system's clock need not be ours: what changed while it was listed is told by the stamps.
    if _is_as_stamped(folder, listing.folders, stamps) and stamps[:, 0].max() < (started - SETTLED_AFTER_SECONDS) * 1e9:
        files.failure_of(lambda: _write(file, listing, stamps))  # without it the next run lists again
    return listing


def forget_listing(folder: Path) -> None:
    """The next one is made anew."""
    files.failure_of(lambda: _file_of(folder).unlink(missing_ok=True))  # where nothing can be kept, nothing is


def _file_of(folder: Path) -> Path:
    return cache_file("folder", [folder], ".npz")


def _stamps(statuses: Iterable[os.stat_result]) -> np.ndarray:
    """(F, 4) int64: of each folder the time of its last change in nanoseconds, its inode, size and number of links."""
    rows = [
        (max(status.st_mtime_ns, status.st_ctime_ns), status.st_ino, status.st_size, status.st_nlink)
        for status in statuses
    ]
    return np.array(rows, dtype=np.uint64).astype(np.int64)


def _is_as_stamped(folder: Path, names: Iterable[str], stamps: np.ndarray) -> bool:
    """Whether no folder has changed since."""
    try:
        return np.array_equal(_stamps((folder / name).stat() for name in names), stamps)
    except OSError:
        return False


def _write(file: Path, listing: Listing, stamps: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = {"classes": listing.class_names, "folders": list(listing.folders), "ignored": listing.ignored}
    blob, ends = listing.items.arrays

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(
                stream,
                version=np.array(FORMAT_VERSION),
                texts=np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8),
                counts=np.array(listing.counts, dtype=np.int64),
                stamps=stamps,
                paths=blob,
                path_ends=ends,
            )

    files.write_atomically(file, write)


def _read(file: Path, folder: Path) -> Listing | None:
    """None if there is none, or a folder has changed."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        if int(arrays["version"]) != FORMAT_VERSION:
            return None
        texts = json.loads(arrays["texts"].tobytes())
        if not _is_as_stamped(folder, texts["folders"], arrays["stamps"]):
            return None
        items = PackedBytes.from_arrays(arrays["paths"], arrays["path_ends"])
        return Listing(texts["classes"], arrays["counts"].tolist(), items, {}, texts["ignored"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
