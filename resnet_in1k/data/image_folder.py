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
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_in1k.data.dataset import (
    IMAGE_SUFFIXES,
    UNKNOWN_ORIGIN,
    FileSource,
    PackedBytes,
    SourceFacts,
    Split,
    read_cache,
    write_cache,
)
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

PARTIAL = ".partial."
"""Prefix of a class folder that prepare_data.py has not completed."""
LAYOUT = "images belong in DATA/train/<class>/ and DATA/val/<class>/"
SETTLED_AFTER_SECONDS = 2.0
"""A folder that has just changed may change again within the same tick of its file system's clock."""

Stamps = dict[str, list[int]]
"""Time of the last change in nanoseconds, inode, size and number of links of each folder, by relative path."""


class Listing(NamedTuple):
    """The images of a split's folder; all paths are relative to this folder."""

    class_names: list[str]
    counts: list[int]
    """Number of images of each class."""
    paths: PackedBytes
    ignored: list[str]
    """Files that are not images."""
    stamps: Stamps
    """All folders that were read, stamped just before."""


def facts(data: str) -> SourceFacts:
    name = Path(data).name or data
    return SourceFacts(name=name, data_flag=shlex.quote(f"path/to/{name}"), limits=(UNKNOWN_ORIGIN,))


def open_split(data: str, split: Split) -> FileSource:
    folder = _root(data) / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {LAYOUT}; for images without a val split give --val-share")
    return _open(data, split, folder)


def open_whole(data: str) -> FileSource:
    """Open `train/<class>/*` or `<class>/*`; raises UserError if there is a val split."""
    root = _root(data)
    if (root / "val").is_dir():
        raise UserError(f"--val-share: {data} has a val split; omit --val-share, or give --data {root / 'train'}")
    return _open(data, "train", root / "train" if (root / "train").is_dir() else root)


def forget(data: str) -> None:
    """Delete the cached listings, for `--rescan`."""
    for folder in (Path(data), Path(data, "train"), Path(data, "val")):
        with contextlib.suppress(OSError):
            _cache_file(folder).unlink(missing_ok=True)


def open_paths(paths: Sequence[str]) -> FileSource:
    """Open image files in this order, each with the label 0, for prediction."""
    return FileSource(
        name="images",
        split="val",
        class_names=("",),
        labels=np.zeros(len(paths), dtype=np.int64),
        paths=PackedBytes(map(os.fsencode, paths)),
        folder=Path(),
    )


def list_images(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield (image file, "") for each file and each image in a folder, and (path, reason) for what cannot be read."""
    for path in paths:
        try:
            if path.is_dir():
                images = sorted(images_below(path, str(path), ignored=[], stamps={}))
                yield from ((image, "") for image in images)
                if not images:
                    yield str(path), "no images in this folder"
            else:
                path.open("rb").close()
                yield str(path), ""
        except OSError as error:
            yield str(path), error.strerror or str(error)


def _root(data: str) -> Path:
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: no such folder; {LAYOUT}, or use --data digits to try without data")
    return Path(data)


def _open(data: str, split: Split, folder: Path) -> FileSource:
    try:
        listing = _read_listing(folder) or _list_and_cache(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}; check its permissions") from None
    ignored = listing.ignored
    return FileSource(
        name=data,
        split=split,
        class_names=tuple(listing.class_names),
        labels=np.repeat(np.arange(len(listing.class_names)), listing.counts),
        paths=listing.paths,
        folder=folder,
        note=f"ignored in {folder}, not images by name or content: {shorten(ignored)}" if ignored else "",
    )


def _cache_file(folder: Path) -> Path:
    return files.cache_file("folder", [folder], ".npz")


def _read_listing(folder: Path) -> Listing | None:
    """Read the cached listing; None if there is none, or a folder has changed since."""
    cached = read_cache(_cache_file(folder))
    if cached is None:
        return None
    facts, paths, _ = cached
    listing = Listing(facts["class_names"], facts["counts"], paths, facts["ignored"], facts["stamps"])
    return listing if _is_unchanged(folder, listing.stamps) else None


def _list_and_cache(folder: Path) -> Listing:
    started = time.time()
    listing = _list(folder)
    last_change = max(stamp[0] for stamp in listing.stamps.values())
    # Both checks are needed: the file system's clock may differ from this machine's, and a change within one tick of it
    # leaves the stamps equal.
    if last_change < (started - SETTLED_AFTER_SECONDS) * 1e9 and _is_unchanged(folder, listing.stamps):
        with contextlib.suppress(OSError):  # without a cache the next run lists again
            write_cache(_cache_file(folder), {**listing._asdict(), "paths": None}, listing.paths)
    return listing


def _stamp(folder: Path) -> list[int]:
    status = folder.stat()
    return [max(status.st_mtime_ns, status.st_ctime_ns), status.st_ino, status.st_size, status.st_nlink]


def _is_unchanged(folder: Path, stamps: Stamps) -> bool:
    try:
        return all(_stamp(folder / name) == stamp for name, stamp in stamps.items())
    except OSError:
        return False


def _list(folder: Path) -> Listing:
    if next(folder.glob(f"{PARTIAL}*"), None):
        raise UserError(f"{folder} is incomplete: rerun the prepare_data.py command that was interrupted there")
    stamps, ignored, counts = {"": _stamp(folder)}, list[str](), list[int]()
    entries = sorted(_visible(folder), key=lambda entry: entry.name)
    class_names = [entry.name for entry in entries if entry.is_dir()]
    if others := [entry.name for entry in entries if not entry.is_dir()]:
        raise UserError(f"{folder}: files must be in a folder named for their class, not here: {shorten(others)}")
    if not class_names:
        raise UserError(f"{folder}: no class folders in it; {LAYOUT}")

    def paths() -> Iterator[bytes]:
        for name in class_names:
            images = sorted(images_below(folder / name, name, ignored, stamps))
            if not images:
                raise UserError(f"{folder / name}: no images in this class; add some or remove the folder")
            counts.append(len(images))
            yield from map(os.fsencode, images)

    return Listing(class_names, counts, PackedBytes(paths()), ignored, stamps)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder except hidden entries, which operating systems and editors create."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def images_below(folder: Path, prefix: str, ignored: list[str], stamps: Stamps) -> list[str]:
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
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path).close()
    except OSError:
        return False
    except (ValueError, SyntaxError, Image.DecompressionBombError):
        return True  # a damaged image, which must be reported
    return True
