"""The interface of an image source, a source in memory, and the cache of a listing of images."""

import contextlib
import functools
import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from resnet_in1k.utils import files

Split = str
"""`train`, `val`, or another split that the data has."""
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
"""Names that data has for the splits, in order of preference."""
CACHE_KIND = "listing-5"
"""Prefix of the files of cached listings, with the version of their format."""


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
    """One split: encoded images with their labels. Subclasses define `read`, and `fingerprint` if there are no keys.

    Loader workers read it, so it must survive a fork. The main process opens it for others, so it must be picklable.
    """

    name: str
    """The value of `--data`."""
    split: Split
    class_names: tuple[str, ...]
    labels: np.ndarray
    """(N,) int64, indices into class_names."""
    keys: PackedBytes = field(default_factory=PackedBytes)
    """N unique names of the images, the same wherever the source is stored; none if `--val-share` cannot divide it."""
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
        return fingerprint_of(self.class_names, self.labels, self.keys.blob, self.keys.ends)

    def take(self, indices: np.ndarray, split: Split) -> "Source":
        """Return a source of these images only."""
        keys = PackedBytes(self.keys[index] for index in indices)
        return replace(self, split=split, labels=self.labels[indices], keys=keys)


class SourceFacts(NamedTuple):
    """Facts about the data for a model card."""

    name: str
    """Without the folders above it, which are not for publication."""
    data_flag: str
    """The value of `--data` for somebody who reproduces the run."""
    limits: str = "It is not recorded who took the training images, where, or of what; their bias is unknown."
    """Limitations of the data, a sentence; by default those of a user's own images."""


class SourceType(Protocol):
    """A module or class for one prefix of `--data`. It may have `open_whole(data)`, for images without a val split."""

    def open_split(self, data: str, split: Split) -> Source: ...  # UserError if there is no such data

    def facts(self, data: str) -> SourceFacts: ...  # the data need not be available


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


def spread_over(source: Source, num_images: int) -> list[int]:
    """Return at most `num_images` indices, evenly spread over the source."""
    return np.linspace(0, len(source) - 1, num=min(num_images, len(source)), dtype=np.int64).tolist()


def sample_sums(source: Source, num_images: int) -> dict[str, str]:
    """Return the sha256 of images spread over the source, or why one cannot be read, by image name."""
    sums = {}
    for index in spread_over(source, num_images):
        try:
            image = files.retry_once(functools.partial(source.read, index))
            sums[source.image_name(index)] = hashlib.sha256(image).hexdigest()
        except OSError as error:
            sums[source.image_name(index)] = f"cannot be read: {error.strerror or error}"
    return sums


def samples_sha256(source: Source, num_images: int) -> str:
    """Return one sha256 of the content of images spread over the source."""
    return hashlib.sha256("\0".join(sample_sums(source, num_images).values()).encode()).hexdigest()


def write_cache(paths: Sequence[Path], facts: dict[str, Any], *, keys: PackedBytes, **arrays: np.ndarray) -> None:
    """Cache a listing of the images at these paths; `facts` may have any JSON values. The cache may be read-only."""
    text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    arrays |= {"facts": text, "blob": keys.blob, "ends": keys.ends}
    file = files.cache_file(CACHE_KIND, paths, ".safetensors")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(file, functools.partial(save_file, arrays))


def read_cache(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the facts, and the keys and arrays by name; None if they are not cached, or the file is damaged."""
    try:
        arrays = load_file(files.cache_file(CACHE_KIND, paths, ".safetensors"))
    except (OSError, SafetensorError):
        return None
    facts, keys = json.loads(arrays.pop("facts").tobytes()), PackedBytes()
    keys.blob, keys.ends = arrays.pop("blob"), arrays.pop("ends")
    return facts, {"keys": keys, **arrays}


def delete_caches() -> None:
    """Delete the cached listings of all data."""
    with contextlib.suppress(OSError):
        for file in files.cache_file(CACHE_KIND, [], "").parent.glob(f"{CACHE_KIND}-*"):
            file.unlink(missing_ok=True)
