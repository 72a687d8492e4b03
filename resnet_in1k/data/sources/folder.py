"""A folder with `train/<class>/*` and `val/<class>/*`."""

import hashlib
import os
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from resnet_in1k.core.errors import UserError
from resnet_in1k.core.text import shorten
from resnet_in1k.data.listing import Listing, forget_listing, kept_listing
from resnet_in1k.data.source import IMAGE_SUFFIXES, FileSource, PackedBytes, SourceFacts, Split

LAYOUT = "images belong in DATA/train/<class>/ and DATA/val/<class>/"


def facts(data: str) -> SourceFacts:
    name = Path(data).name or data
    limits = ("Who took the training images, where and of what, is not recorded here: neither is their bias.",)
    return SourceFacts(name=name, data_flag=shlex.quote(f"path/to/{name}"), limits=limits)


def open_split(data: str, split: Split) -> FileSource:
    folder = _root(data) / split
    if not folder.is_dir():
        without = "; for images without a val split give --val-share" if split == "val" else ""
        raise UserError(f"{folder}: no such folder; {LAYOUT}{without}")
    return _open(data, split, folder)


def open_share(data: str, split: Split, val_share: float) -> FileSource:
    """Of a folder with `train/<class>/*` or `<class>/*` alone: the images whose names' hashes are in the val share, or
    the others. The same on any machine, and an image that is added moves no other; only that each class has at least
    one image in either split.
    """
    root = _root(data)
    if (root / "val").is_dir():
        raise UserError(f"--val-share {val_share:g}: {data} has a val split; leave it out, or name {root / 'train'}")
    folder = root / "train" if (root / "train").is_dir() else root
    whole = _open(data, split, folder)
    places = np.array([_place_of(whole.items[index]) for index in range(len(whole))])
    is_val = places < val_share
    for label, name in enumerate(whole.class_names):
        (members,) = np.nonzero(whole.labels == label)
        if len(members) == 1:
            raise UserError(f"{folder / name}: one image, which cannot be in both splits; add some, or remove it")
        if not is_val[members].any():
            is_val[members[places[members].argmin()]] = True
        elif is_val[members].all():
            is_val[members[places[members].argmax()]] = False
    (chosen,) = np.nonzero(is_val if split == "val" else ~is_val)
    return replace(whole, labels=whole.labels[chosen], items=PackedBytes(whole.items[index] for index in chosen))


def _place_of(name: bytes) -> float:
    """From 0 to 1, by the hash of an image's path below its split's folder."""
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64


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
    classes, counts, folders, ignored = _class_folders(folder), [], [""], []

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


def images_below(folder: Path, prefix: str, ignored: list[str], folders: list[str]) -> list[str]:
    """Paths of image files at any depth, relative to the split's folder; other files are added to `ignored`, and the
    folders that were read to `folders`."""
    images: list[str] = []
    folders.append(prefix)
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
