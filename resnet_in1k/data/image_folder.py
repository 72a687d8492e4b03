"""A folder with `train/<class>/*` and `val/<class>/*`."""

import os
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from resnet_in1k.data.dataset import IMAGE_SUFFIXES, FileSource, PackedBytes, SourceFacts, Split
from resnet_in1k.data.listing import Listing, forget_listing, kept_listing
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

PARTIAL = ".partial."
"""Before the name of a class that prepare_data.py has not written whole."""
LAYOUT = "images belong in DATA/train/<class>/ and DATA/val/<class>/"


def facts(data: str) -> SourceFacts:
    name = Path(data).name or data
    limits = ("Who took the training images, where and of what, is not recorded here: neither is their bias.",)
    return SourceFacts(name=name, data_flag=shlex.quote(f"path/to/{name}"), limits=limits)


def open_split(data: str, split: Split) -> FileSource:
    folder = _root(data) / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {LAYOUT}; for images without a val split give --val-share")
    return _open(data, split, folder)


def open_whole(data: str) -> FileSource:
    """Of `train/<class>/*` or `<class>/*` alone."""
    root = _root(data)
    if (root / "val").is_dir():
        raise UserError(f"--val-share: {data} has a val split; leave it out, or name {root / 'train'}")
    return _open(data, "train", root / "train" if (root / "train").is_dir() else root)


def _root(data: str) -> Path:
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: no such folder; {LAYOUT}, or use --data digits to try without data")
    return Path(data)


def _open(data: str, split: Split, folder: Path) -> FileSource:
    try:
        listing = kept_listing(folder, lambda: _list(folder))
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}; check its permissions") from None
    ignored = listing.ignored
    return FileSource(
        name=data,
        split=split,
        class_names=tuple(listing.class_names),
        labels=np.repeat(np.arange(len(listing.class_names)), listing.counts),
        items=listing.items,
        folder=folder,
        note=f"ignored in {folder}, not images by name or content: {shorten(ignored)}" if ignored else "",
    )


def forget(data: str) -> None:
    """Nothing that was found before is used: for `--rescan`."""
    for folder in (Path(data), Path(data, "train"), Path(data, "val")):
        forget_listing(folder)


def _list(folder: Path) -> Listing:
    counts: list[int] = []
    ignored: list[str] = []
    folders = {"": folder.stat()}
    classes = _class_folders(folder)

    def paths() -> Iterator[bytes]:
        for name in classes:
            images = sorted(images_below(folder / name, name, ignored, folders))
            if not images:
                raise UserError(f"{folder / name}: no images in this class; add some or remove the folder")
            counts.append(len(images))
            yield from map(os.fsencode, images)

    return Listing(classes, counts, PackedBytes(paths()), folders, ignored)


def _class_folders(folder: Path) -> list[str]:
    """Their names, sorted; raises UserError if there are none, or files beside them."""
    entries = sorted(_visible(folder), key=lambda entry: entry.name)
    if next(folder.glob(f"{PARTIAL}*"), None):
        raise UserError(f"{folder} is not whole: prepare_data.py was stopped there; run that command again to go on")
    classes = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if not entry.is_dir()]
    if files:
        raise UserError(f"{folder}: files must be in a folder named for their class, not here: {shorten(files)}")
    if not classes:
        raise UserError(f"{folder}: no class folders in it; {LAYOUT}")
    return classes


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """Entries except hidden ones, which operating systems and editors create."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def images_below(folder: Path, prefix: str, ignored: list[str], folders: dict[str, os.stat_result]) -> list[str]:
    """Paths of image files at any depth, relative to the split's folder; other files are added to `ignored`, and the
    folders that are read to `folders`, as they are just before."""
    images: list[str] = []
    folders[prefix] = folder.stat()
    for entry in _visible(folder):
        relative = f"{prefix}/{entry.name}"
        # A link with an image's suffix is one: to follow a million links over a network takes minutes.
        if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir(follow_symlinks=False):
            images.append(relative)
        elif entry.is_dir():
            images += images_below(folder / entry.name, relative, ignored, folders)
        elif _is_image_by_content(folder / entry.name):
            images.append(relative)
        else:
            ignored.append(relative)
    return images


def _is_image_by_content(path: Path) -> bool:
    """Whether Pillow knows the file's header: for files without a known suffix."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path).close()
    except OSError:
        return False
    except (ValueError, SyntaxError, Image.DecompressionBombError):
        return True  # an image, but a bad one: that must be reported
    return True
