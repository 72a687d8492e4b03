"""The interface of an image source, sources in memory and in files, and the split of one source into train and val."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from resnet_in1k.data.packed_bytes import PackedBytes
from resnet_in1k.utils.errors import UserError

Split = Literal["train", "val"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
"""Suffixes of image files. A file with another suffix is an image if its header is one."""
UNKNOWN_ORIGIN = "Who took the training images, where and of what, is not recorded here: neither is their bias."
"""The limit that a model card states of a user's own images."""


class Source(Protocol):
    """One split: `len(source)` encoded images with their labels.

    Loader workers read it, so it must survive a fork. The main process opens it for others, so it must be picklable.
    """

    name: str
    """The value of `--data`."""
    split: Split
    class_names: tuple[str, ...]
    labels: np.ndarray
    """(N,) int64, indices into class_names."""
    note: str
    """A remark for the user on how the images were found, or ""."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray: ...  # the encoded image, (n,) uint8, read-only; OSError if storage fails

    def image_name(self, index: int) -> str: ...  # for messages: a path, or a position in the source

    def fingerprint(self) -> str: ...  # sha256 of the class names, the labels and the images' names or sizes


class Divisible(Source, Protocol):
    """A source that `--val-share` can divide in two."""

    def key(self, index: int) -> bytes: ...  # the image's unique name, the same wherever the source is stored

    def take(self, indices: np.ndarray, split: Split) -> Source: ...  # a source of these images only


@dataclass(frozen=True)
class SourceFacts:
    """Facts about the data for a model card."""

    name: str
    """Without the folders above it, which are not for publication."""
    data_flag: str
    """The value of `--data` for somebody who reproduces the run."""
    limits: tuple[str, ...]
    """Sentences on what the images do not show."""


class SourceType(Protocol):
    """A module or class that opens the sources of one prefix of `--data`; UserError if there is no such data.

    It may have `open_whole(data) -> Divisible` for images without a val split, and `forget(data)` to delete caches.
    """

    def open_split(self, data: str, split: Split) -> Source: ...

    def facts(self, data: str) -> SourceFacts: ...


def fingerprint_of(class_names: Iterable[str], *arrays: np.ndarray) -> str:
    """Return the sha256 of class names and arrays, as hexadecimal digits."""
    digest = hashlib.sha256("\0".join(class_names).encode("utf-8", "surrogateescape"))
    for values in arrays:
        digest.update(values)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PackedSource:
    """A source with encoded images in memory, `items`; if there are more labels than items, the items repeat."""

    name: str
    split: Split
    class_names: tuple[str, ...]
    labels: np.ndarray
    items: PackedBytes
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        return self.items.view(index % len(self.items))

    def image_name(self, index: int) -> str:
        return f"{self.name}/{self.split}[{index}]"

    def fingerprint(self) -> str:
        return fingerprint_of(self.class_names, self.labels, self.items.blob, self.items.ends)


@dataclass(frozen=True, kw_only=True)
class FileSource(PackedSource):
    """A source of image files; `items` are their paths, relative to `folder`."""

    folder: Path

    def key(self, index: int) -> bytes:
        return self.items[index]

    def take(self, indices: np.ndarray, split: Split) -> "FileSource":
        items = PackedBytes(self.items[index] for index in indices)
        return replace(self, split=split, labels=self.labels[indices], items=items)

    def read(self, index: int) -> np.ndarray:
        # Not np.fromfile, which takes a read error for the end of the file.
        with open(os.path.join(os.fsencode(self.folder), self.items[index]), "rb", buffering=0) as file:
            return np.frombuffer(bytearray(file.readall()), dtype=np.uint8)

    def image_name(self, index: int) -> str:
        return str(Path(self.folder, os.fsdecode(self.items[index])))


def spread_over(source: Source, num_images: int) -> list[int]:
    """Return at most `num_images` indices, evenly spread over the source."""
    return np.linspace(0, len(source) - 1, num=min(num_images, len(source)), dtype=np.int64).tolist()


def sample_sums(source: Source, num_images: int) -> dict[str, str]:
    """Return the sha256 of images spread over the source, or why one cannot be read, by image name."""
    sums = {}
    for index in spread_over(source, num_images):
        try:
            sums[source.image_name(index)] = hashlib.sha256(source.read(index)).hexdigest()
        except OSError as error:
            sums[source.image_name(index)] = f"cannot be read: {error.strerror or error}"
    return sums


def samples_sha256(source: Source, num_images: int) -> str:
    """Return one sha256 of the content of images spread over the source."""
    return hashlib.sha256("\0".join(sample_sums(source, num_images).values()).encode()).hexdigest()


def split_by_hash(source: Divisible, split: Split, val_share: float) -> Source:
    """Return one split of `source`: val has the images with a hash of their key below `val_share`.

    An added image does not move another one, unless a split would have no image of its class.

    Raises:
        UserError: if a class has one image only.
    """
    hashes = (int.from_bytes(hashlib.sha256(source.key(index)).digest()[:8], "big") for index in range(len(source)))
    places = np.fromiter(hashes, np.uint64, len(source)) / 2**64  # uniform in 0 … 1
    is_val = places < val_share
    by_class = np.argsort(source.labels, kind="stable")
    ends = np.cumsum(np.bincount(source.labels, minlength=len(source.class_names)))
    for name, members in zip(source.class_names, np.split(by_class, ends[:-1]), strict=True):
        if len(members) == 1:
            image = source.image_name(int(members[0]))
            raise UserError(
                f"--val-share {val_share:g}: class {name} has one image, {image}, which cannot be in both splits; "
                "add images, or remove the class"
            )
        if len(members) and not is_val[members].any():
            is_val[members[places[members].argmin()]] = True
        elif len(members) and is_val[members].all():
            is_val[members[places[members].argmax()]] = False
    return source.take(np.flatnonzero(is_val if split == "val" else ~is_val), split)
