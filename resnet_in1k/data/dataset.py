"""The interface of an image source, sources in memory and in files, and the cache of a listing of images."""

import contextlib
import hashlib
import json
import os
import zipfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from resnet_in1k.utils import files

Split = Literal["train", "val"]
CACHE_VERSION = 2
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
"""Suffixes of image files. Other files are recognized by their header."""
UNKNOWN_ORIGIN = "It is not recorded who took the training images, where, or of what; their bias is unknown."
"""Limitation that a model card states for a user's own images."""


class PackedBytes:
    """An immutable list of byte strings in two arrays.

    A Python list of a million paths is a million objects: each loader worker that reads one changes its reference
    count and so copies its page of memory, and host memory grows during the run (pytorch#5902).
    """

    def __init__(self, items: Iterable[bytes] = ()):
        blob, ends = bytearray(), array("q", [0])
        for item in items:
            blob += item
            ends.append(len(blob))
        self.blob = np.frombuffer(blob, dtype=np.uint8)  # (n,), all items in a row
        self.ends = np.frombuffer(ends, dtype=np.int64)  # (N + 1,), item i is blob[ends[i]:ends[i + 1]]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.view(index).tobytes()

    def view(self, index: int) -> np.ndarray:
        """Return an item's bytes without a copy, (n,) uint8."""
        return self.blob[self.ends[index] : self.ends[index + 1]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One split: encoded images with their labels. Subclasses define `read` and `fingerprint`.

    Loader workers read it, so it must survive a fork. The main process opens it for others, so it must be picklable.
    """

    name: str
    """The value of `--data`."""
    split: Split
    class_names: tuple[str, ...]
    labels: np.ndarray
    """(N,) int64, indices into class_names."""
    note: str = ""
    """A remark for the user on how the images were found."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Return the encoded image, (n,) uint8, which the caller must not change. Raises OSError if storage fails."""
        raise NotImplementedError

    def image_name(self, index: int) -> str:
        """Return a path, or a position in the source, for messages."""
        return f"{self.name}/{self.split}[{index}]"

    def fingerprint(self) -> str:
        """Return a sha256 of the class names, the labels and the images' names or sizes."""
        raise NotImplementedError


class DivisibleSource(Source):
    """A source that `--val-share` can divide in two."""

    def key(self, index: int) -> bytes:
        """Return the image's unique name, the same wherever the source is stored."""
        raise NotImplementedError

    def take(self, indices: np.ndarray, split: Split) -> "DivisibleSource":
        """Return a source of these images only."""
        raise NotImplementedError


@dataclass(frozen=True)
class SourceFacts:
    """Facts about the data for a model card."""

    name: str
    """Without the folders above it, which are not for publication."""
    data_flag: str
    """The value of `--data` for somebody who reproduces the run."""
    limits: tuple[str, ...]
    """Limitations of the data, one sentence each."""


class SourceType(Protocol):
    """A module or class that opens the sources of one prefix of `--data`; UserError if there is no such data.

    It may have `open_whole(data) -> DivisibleSource`, for images without a val split, and `forget(data)`, which deletes
    caches.
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
class PackedSource(Source):
    """A source with encoded images in memory, `items`; if there are more labels than items, the items repeat."""

    items: PackedBytes

    def read(self, index: int) -> np.ndarray:
        return self.items.view(index % len(self.items))

    def fingerprint(self) -> str:
        return fingerprint_of(self.class_names, self.labels, self.items.blob, self.items.ends)


@dataclass(frozen=True, kw_only=True)
class FileSource(DivisibleSource):
    """A source of image files; `paths` are relative to `folder`."""

    paths: PackedBytes
    folder: Path

    def key(self, index: int) -> bytes:
        return self.paths[index]

    def take(self, indices: np.ndarray, split: Split) -> "FileSource":
        paths = PackedBytes(self.paths[index] for index in indices)
        return replace(self, split=split, labels=self.labels[indices], paths=paths)

    def read(self, index: int) -> np.ndarray:
        # Not np.fromfile, which takes a read error for the end of the file. A bytearray, because torch warns about
        # memory that it cannot write to.
        with open(os.path.join(os.fsencode(self.folder), self.paths[index]), "rb", buffering=0) as file:
            return np.frombuffer(bytearray(file.readall()), dtype=np.uint8)

    def image_name(self, index: int) -> str:
        return str(Path(self.folder, os.fsdecode(self.paths[index])))

    def fingerprint(self) -> str:
        return fingerprint_of(self.class_names, self.labels, self.paths.blob, self.paths.ends)


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


def write_cache(file: Path, facts: dict[str, Any], items: PackedBytes, **arrays: np.ndarray) -> None:
    """Write a listing of images. `facts` may have any JSON values. Raises OSError if the file cannot be written."""

    def write(path: Path) -> None:
        text = np.frombuffer(json.dumps({"version": CACHE_VERSION, **facts}).encode(), dtype=np.uint8)
        with path.open("wb") as stream:
            np.savez(stream, facts=text, blob=items.blob, ends=items.ends, **arrays)

    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(file, write)


def read_cache(file: Path) -> tuple[dict[str, Any], PackedBytes, dict[str, np.ndarray]] | None:
    """Read a listing; None if there is none, or the file is damaged or of another version."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as cached:
            arrays = {name: cached[name] for name in cached.files}
        facts, items = json.loads(arrays.pop("facts").tobytes()), PackedBytes()
        items.blob, items.ends = arrays.pop("blob"), arrays.pop("ends")
        if facts["version"] == CACHE_VERSION:
            return facts, items, arrays
    return None
