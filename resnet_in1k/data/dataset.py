"""What a source of images is, and the two kinds of it that lie in memory and in files."""

import hashlib
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from resnet_in1k.utils.errors import UserError

Split = Literal["train", "val"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
"""Of a file's name; files of others are looked into."""


class Source(Protocol):
    """One split: `len(source)` encoded images with their labels.

    Loader workers read it, so it must survive a fork; the main process opens it for all, so it must survive pickling.
    """

    name: str
    """As `--data` named it."""
    split: Split
    class_names: tuple[str, ...]
    labels: np.ndarray
    """(N,) int64, indices into class_names."""
    note: str
    """What a person should know about how the images were found; "" for nothing."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """The encoded image, (n,) uint8, not to be written to; raises OSError if its storage fails."""
        ...

    def image_name(self, index: int) -> str:
        """For messages: its path, or its position in the source."""
        ...

    def fingerprint(self) -> str:
        """sha256 that changes with the class names, the labels and which images there are."""
        ...


class Divisible(Source, Protocol):
    """A source that can be divided in two, for `--val-share`."""

    def key(self, index: int) -> bytes:
        """What tells an image from the others of the source, wherever the source lies."""
        ...

    def take(self, indices: np.ndarray, split: Split) -> Source:
        """These images alone, as a split."""
        ...


@dataclass(frozen=True)
class SourceFacts:
    """What a model card says of a source, told by what `--data` named, without opening it."""

    name: str
    """Without the folders it lies in, which are not for publication."""
    data_flag: str
    """What somebody else gives to `--data` to reproduce."""
    limits: tuple[str, ...]
    """Sentences on what the images do not show."""


class SourceType(Protocol):
    """How to open the sources of one prefix of `--data`; a module with these two functions is one.

    It may have `open_whole(data) -> Divisible`, for images without a val split, which raises UserError if there is one;
    and `forget(data)`, after which nothing that was kept of the data is used.
    """

    def open_split(self, data: str, split: Split) -> Source:
        """Raises UserError if there is no such data."""
        ...

    def facts(self, data: str) -> SourceFacts: ...


class PackedBytes:
    """An immutable list of byte strings in two arrays.

    A Python list of a million paths is a million objects: each loader worker that reads one changes its reference
    count and so copies its page of memory, and host memory grows during the run (pytorch#5902).
    """

    def __init__(self, items: Iterable[bytes]):
        blob, ends = bytearray(), array("q", [0])
        for item in items:
            blob += item
            ends.append(len(blob))
        self._blob = np.frombuffer(blob, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    @classmethod
    def from_arrays(cls, blob: np.ndarray, ends: np.ndarray) -> "PackedBytes":
        """Of what `arrays` gave."""
        packed = cls(())
        packed._blob, packed._ends = blob, ends
        return packed

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All bytes in a row, (n,) uint8, and where each item ends, (N + 1,) int64, beginning with 0."""
        return self._blob, self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.view(index).tobytes()

    def view(self, index: int) -> np.ndarray:
        """An item's bytes without a copy, (n,) uint8."""
        return self._blob[self._ends[index] : self._ends[index + 1]]

    @property
    def num_bytes(self) -> int:
        return self._blob.nbytes + self._ends.nbytes

    def update(self, digest: "hashlib._Hash") -> None:
        digest.update(self._blob)
        digest.update(self._ends)


@dataclass(frozen=True, kw_only=True)
class PackedSource:
    """A source whose `items` are encoded images in memory; repeated from the start if there are more labels."""

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
        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        digest.update(self.labels)
        self.items.update(digest)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class FileSource(PackedSource):
    """A source whose `items` are paths of image files, relative to `folder`."""

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


def samples_sha256(source: Source, num_images: int) -> str:
    """Of the content of images spread evenly over the source."""
    return hashlib.sha256("\0".join(sample_sums(source, num_images).values()).encode()).hexdigest()


def spread_over(source: Source, num_images: int) -> list[int]:
    """Positions of so many images, or of all if there are fewer, evenly over the source."""
    return np.linspace(0, len(source) - 1, num=min(num_images, len(source)), dtype=np.int64).tolist()


def sample_sums(source: Source, num_images: int) -> dict[str, str]:
    """sha256 of the bytes of images spread evenly over the source, or why they cannot be read, by image name."""
    sums = {}
    for index in spread_over(source, num_images):
        try:
            sums[source.image_name(index)] = hashlib.sha256(source.read(index)).hexdigest()
        except OSError as error:
            sums[source.image_name(index)] = f"cannot be read: {error.strerror or error}"
    return sums


def split_by_hash(whole: Divisible, split: Split, val_share: float) -> Source:
    """The images of `whole` whose names' hashes are in the val share, or the others.

    An image that is added moves no other; only that each class has at least one image in either split.

    Raises:
        UserError: if a class has one image only.
    """
    places = np.array([_place_of(whole.key(index)) for index in range(len(whole))])
    is_val = places < val_share
    by_class = np.argsort(whole.labels, kind="stable")
    ends = np.cumsum(np.bincount(whole.labels, minlength=len(whole.class_names)))
    for name, members in zip(whole.class_names, np.split(by_class, ends[:-1]), strict=True):
        if len(members) == 1:
            image = whole.image_name(int(members[0]))
            raise UserError(
                f"--val-share {val_share:g}: class {name} has one image, {image}, which cannot be in both splits; "
                "add some, or remove it"
            )
        if len(members) and not is_val[members].any():
            is_val[members[places[members].argmin()]] = True
        elif len(members) and is_val[members].all():
            is_val[members[places[members].argmax()]] = False
    (chosen,) = np.nonzero(is_val if split == "val" else ~is_val)
    return whole.take(chosen, split)


def _place_of(key: bytes) -> float:
    """From 0 to 1."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
