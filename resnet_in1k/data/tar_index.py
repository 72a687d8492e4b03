"""Where each image lies in tar shards of WebDataset's convention: found once, kept beside the shards.

A sample is a run of entries with one key, the name up to its first dot: an image, and its label in `.cls`, a number, or
in `.json`, under `label` (https://github.com/webdataset/webdataset#the-webdataset-format).
"""

import itertools
import json
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_in1k.data.dataset import IMAGE_SUFFIXES, PackedBytes
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import cache_file, digest_of
from resnet_in1k.utils.pool import Progress, run_parallel

FORMAT_VERSION = 1
MAX_LABEL_BYTES = 1 << 20
"""Of a `.cls` or `.json` entry; a larger one is none."""
MAX_CLASSES = 1_000_000
"""A larger label is something else, such as a hash."""


class Entries(NamedTuple):
    """The images in a shard, as they stand in it."""

    keys: list[bytes]
    numbers: np.ndarray
    """(n, 3) int64: of each the offset of its first byte in the shard, its size and its label."""


@dataclass(frozen=True)
class ShardIndex:
    """All images of some shards, sorted by key, then by shard and offset."""

    shards: tuple[str, ...]
    """Their paths."""
    stats: np.ndarray
    """(S, 2) int64: each one's size in bytes, and time of modification in nanoseconds."""
    keys: PackedBytes
    shard_of: np.ndarray
    """(N,) int64; so are `offsets`, `sizes` and `labels`."""
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "ShardIndex":
        """Of these images alone."""
        arrays = {name: getattr(self, name)[indices] for name in ("shard_of", "offsets", "sizes", "labels")}
        return replace(self, keys=PackedBytes(self.keys[index] for index in indices), **arrays)


def index_shards(shards: Sequence[Path]) -> ShardIndex:
    """The index that is kept of these shards, if they have not changed since; else a new one.

    Raises:
        UserError: naming the shard, if it cannot be read, is cut off, or has an image without a label.
    """
    stats = np.array([_stat(shard) for shard in shards], dtype=np.int64)
    names = [shard.name for shard in shards]
    for file in _index_files(shards):
        kept = _read_index(file, shards, names, stats)
        if kept is not None:
            return kept
    index = _build(shards, stats)
    for file in _index_files(shards):
        if files.failure_of(lambda file=file: _write_index(index, names, file)) is None:
            break  # the shards' own folder may be read-only
    return index


def forget_index(shards: Sequence[Path]) -> None:
    """The next one is made anew."""
    for file in _index_files(shards) if shards else ():
        files.failure_of(lambda file=file: file.unlink(missing_ok=True))


def _stat(shard: Path) -> tuple[int, int]:
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns


def _index_files(shards: Sequence[Path]) -> Iterator[Path]:
    """Where the index may be kept: beside the shards, else in the user's cache."""
    yield shards[0].parent / f".index-{digest_of(shard.name for shard in shards)}.npz"
    yield cache_file("shards", shards, ".npz")


def _write_index(index: ShardIndex, names: Sequence[str], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    blob, ends = index.keys.arrays
    arrays = {
        "version": np.array(FORMAT_VERSION),
        "names": np.frombuffer(json.dumps(list(names)).encode(), dtype=np.uint8),
        "stats": index.stats,
        "keys": blob,
        "key_ends": ends,
        **{name: getattr(index, name) for name in ("shard_of", "offsets", "sizes", "labels")},
    }

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, **arrays)

    files.write_atomically(file, write)


def _read_index(file: Path, shards: Sequence[Path], names: list[str], stats: np.ndarray) -> ShardIndex | None:
    """None if there is none, or not of these shards as they are now."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        if int(arrays["version"]) != FORMAT_VERSION or json.loads(arrays["names"].tobytes()) != names:
            return None
        if not np.array_equal(arrays["stats"], stats):
            return None
        columns = [arrays[name] for name in ("shard_of", "offsets", "sizes", "labels")]
        keys = PackedBytes.from_arrays(arrays["keys"], arrays["key_ends"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return ShardIndex(tuple(map(str, shards)), stats, keys, *columns)


def _build(shards: Sequence[Path], stats: np.ndarray) -> ShardIndex:
    from resnet_in1k.utils.device import usable_cores  # psutil, which prediction does not need

    progress = Progress(only_if_long=True)
    progress.start(len(shards), f"index of {shards[0].parent}", "shards")
    found: dict[int, Entries] = {}
    for number, entries in run_parallel(partial(_read_numbered, shards), range(len(shards)), usable_cores()):
        found[number] = entries
        progress.add(1)
    progress.finish()
    in_order = [found.pop(number) for number in range(len(shards))]
    keys = list(itertools.chain.from_iterable(entries.keys for entries in in_order))
    if not keys:
        raise UserError(f"{shards[0].parent}: no images with labels in the {len(shards)} shards")
    shard_of = np.repeat(np.arange(len(shards)), [len(entries.keys) for entries in in_order])
    numbers = np.concatenate([entries.numbers for entries in in_order])
    order = sorted(range(len(keys)), key=keys.__getitem__)  # stable: of one key, as they stand in the shards
    columns = [column[order] for column in (shard_of, *numbers.T)]
    return ShardIndex(tuple(map(str, shards)), stats, PackedBytes(map(keys.__getitem__, order)), *columns)


def _read_numbered(shards: Sequence[Path], number: int) -> tuple[int, Entries]:
    return number, read_shard(shards[number])


def read_shard(shard: Path) -> Entries:
    """Its images.

    Raises:
        UserError: if it is no tar file, is cut off, or has an image without a label or the other way round.
    """
    found: list[Entry] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            sample = _Sample(shard)
            for member in whole(archive):
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != sample.key:
                    found += sample.finished()
                    sample = _Sample(shard, key)
                sample.add(archive, member, extension.lower())
            found += sample.finished()
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shard} is cut off or no tar file ({error}); remove it and get or write it anew") from None
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {error.strerror or error}") from None
    return Entries([entry.key for entry in found], np.array([entry[1:] for entry in found], np.int64).reshape(-1, 3))


def whole(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its entries.

    Raises:
        tarfile.ReadError: if it does not end with the format's block of zeros: Python takes a damaged header for the
            end, and a file that is cut off between two entries for a whole one.
    """
    yield from archive
    assert archive.fileobj is not None, "it is open"
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no entry and no end at byte {archive.offset:,}")


class Entry(NamedTuple):
    key: bytes
    offset: int
    size: int
    label: int


class _Sample:
    """The entries of one key."""

    def __init__(self, shard: Path, key: str = ""):
        self.key = key
        self._shard = shard
        self._image: tuple[int, int] | None = None
        self._label: int | None = None
        self._wrong_label = ""
        """What was found in place of a number."""

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
        is_image = f".{extension}" in IMAGE_SUFFIXES
        if not member.isreg():
            if is_image and not member.isdir():
                raise UserError(
                    f"{self._shard}: {member.name} is a link or a device; write the shard again, with files (tar "
                    "--dereference --hard-dereference)"
                )
        elif is_image:
            if self._image is not None:
                raise UserError(f"{self._shard}: {self.key} has two images; a sample is one image with its label")
            self._image = member.offset_data, member.size
        elif extension in ("cls", "json") and self._label is None and member.size <= MAX_LABEL_BYTES:
            file = archive.extractfile(member)
            assert file is not None, "a regular entry"
            self._read_label(file.read(), extension)

    def _read_label(self, text: bytes, extension: str) -> None:
        try:
            value = json.loads(text)
            value = value["label"] if extension == "json" else value
        except (ValueError, KeyError, TypeError, RecursionError):
            value = None if extension == "json" else text[:20].decode(errors="replace")
        if type(value) is int and 0 <= value < MAX_CLASSES:
            self._label = value
        elif value is not None:
            self._wrong_label = f", but {str(value)[:20]!r}"

    def finished(self) -> list[Entry]:
        if self._image is not None and self._label is not None:
            return [Entry(self.key.encode("utf-8", "surrogateescape"), *self._image, self._label)]
        if self._image is not None:
            raise UserError(
                f"{self._shard}: {self.key} has no label{self._wrong_label}; each image needs a .cls with a number "
                'from 0 on beside it, or a .json with such a "label"'
            )
        if self._label is not None:
            raise UserError(
                f"{self._shard}: {self.key} has a label, but no image; its name has to be {Path(self.key).name}.jpg, "
                ".png, … without another dot"
            )
        return []
