"""The files of a folder by class, kept between runs: listing a million of them takes minutes on network storage."""

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_in1k.core import files
from resnet_in1k.core.cache import cache_file
from resnet_in1k.data.source import PackedBytes

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
    folders: list[str]
    """All folders that were read, relative to it; "" for itself."""
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
    stamps = _stamps(folder, listing.folders)
    if stamps is not None and stamps[:, 0].max() < (started - SETTLED_AFTER_SECONDS) * 1e9:
        files.failure_of(lambda: _write(file, listing, stamps))  # without it the next run lists again
    return listing


def forget_listing(folder: Path) -> None:
    """The next one is made anew."""
    _file_of(folder).unlink(missing_ok=True)


def _file_of(folder: Path) -> Path:
    return cache_file("folder", [folder], ".npz")


def _stamps(folder: Path, folders: list[str]) -> np.ndarray | None:
    """(F, 4) int64: of each folder the time of its last change in nanoseconds, its inode, size and number of links."""
    try:
        statuses = [(folder / name).stat() for name in folders]
    except OSError:
        return None
    rows = [
        (max(status.st_mtime_ns, status.st_ctime_ns), status.st_ino, status.st_size, status.st_nlink)
        for status in statuses
    ]
    return np.array(rows, dtype=np.uint64).astype(np.int64)


def _write(file: Path, listing: Listing, stamps: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = {"classes": listing.class_names, "folders": listing.folders, "ignored": listing.ignored}
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
        stamps = _stamps(folder, texts["folders"])
        if stamps is None or not np.array_equal(stamps, arrays["stamps"]):
            return None
        items = PackedBytes.from_arrays(arrays["paths"], arrays["path_ends"])
        return Listing(texts["classes"], arrays["counts"].tolist(), items, texts["folders"], texts["ignored"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
