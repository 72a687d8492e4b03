"""The index of tar shards: the place and label of each image, found by one pass over the shards and cached.

The format is WebDataset's (https://github.com/webdataset/webdataset): a sample is a run of entries with one key, the
name up to its first dot. It has an image and its label, a number in `.cls` or, under `label`, in `.json`.
"""

import contextlib
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from resnet_in1k.data.dataset import IMAGE_SUFFIXES, PackedBytes, read_cache, write_cache
from resnet_in1k.utils.console import progress_bar
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import cache_file
from resnet_in1k.utils.pool import run_parallel

MAX_LABEL_BYTES = 1 << 20
"""Larger `.cls` and `.json` entries are ignored."""
MAX_CLASSES = 1_000_000
"""A larger label is something else, such as a hash."""


@dataclass(frozen=True)
class ShardIndex:
    """All images of some shards, sorted by key, then by shard and offset."""

    shards: tuple[str, ...]
    """Paths."""
    stats: np.ndarray
    """(S, 2) int64: size in bytes and time of modification in nanoseconds of each shard."""
    keys: PackedBytes
    shard_of: np.ndarray
    """(N,) int64, as are the next three."""
    offsets: np.ndarray
    """Position in the shard, in bytes."""
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "ShardIndex":
        arrays = {name: getattr(self, name)[indices] for name in ("shard_of", "offsets", "sizes", "labels")}
        return replace(self, keys=PackedBytes(self.keys[index] for index in indices), **arrays)


def index_shards(shards: Sequence[Path]) -> ShardIndex:
    """Return the cached index of these shards, or a new one if a shard has changed.

    Raises:
        UserError: naming the shard, if it cannot be read, is incomplete, or has an image without a label.
    """
    stats, cache = stats_of(shards), cache_file("shards", shards, ".npz")
    cached = read_cache(cache)
    if cached and np.array_equal(cached[2].pop("stats", None), stats):
        return ShardIndex(tuple(map(str, shards)), stats, cached[1], **cached[2])
    index = _build(shards, stats)
    columns = {name: getattr(index, name) for name in ("stats", "shard_of", "offsets", "sizes", "labels")}
    with contextlib.suppress(OSError):  # without a cache the next run indexes again
        write_cache(cache, {}, index.keys, **columns)
    return index


def forget_index(shards: Sequence[Path]) -> None:
    """Delete the cached index."""
    with contextlib.suppress(OSError):
        cache_file("shards", shards, ".npz").unlink(missing_ok=True)


def stats_of(shards: Iterable[Path]) -> np.ndarray:
    """Return sizes and times, see `ShardIndex.stats`."""
    try:
        statuses = [shard.stat() for shard in shards]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    return np.array([(status.st_size, status.st_mtime_ns) for status in statuses], dtype=np.int64)


def _build(shards: Sequence[Path], stats: np.ndarray) -> ShardIndex:
    from resnet_in1k.utils.device import usable_cores  # imports psutil, which prediction does not need

    keys, rows = list[bytes](), list[np.ndarray]()
    with progress_bar(len(shards), f"index of {shards[0].parent}", "shards", only_if_long=True) as bar:
        for keys_of_shard, rows_of_shard in run_parallel(read_shard, shards, usable_cores()):
            keys += keys_of_shard
            rows.append(rows_of_shard)
            bar.update()
    if not keys:
        raise UserError(f"{shards[0].parent}: no images with labels in the {len(shards)} shards")
    shard_of = np.repeat(np.arange(len(shards)), [len(each) for each in rows])
    numbers = np.concatenate(rows)
    order = sorted(range(len(keys)), key=keys.__getitem__)  # stable: equal keys stay in the order of the shards
    columns = [column[order] for column in (shard_of, *numbers.T)]
    return ShardIndex(tuple(map(str, shards)), stats, PackedBytes(map(keys.__getitem__, order)), *columns)


def read_shard(shard: Path) -> tuple[list[bytes], np.ndarray]:
    """Return the keys of a shard's images and, (n, 3) int64, their offsets, sizes and labels.

    Raises:
        UserError: if it is not a complete tar file, or has an image without a label or a label without an image.
    """
    keys: list[bytes] = []
    rows: list[tuple[int, int, int]] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for key, members in itertools.groupby(intact_entries(archive), key=lambda member: _parts(member)[0]):
                if sample := _read_sample(archive, f"{shard}: {key}", members):
                    keys.append(key.encode("utf-8", "surrogateescape"))
                    rows.append(sample)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shard} is truncated or not a tar file ({error}); copy or write it again") from None
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {error.strerror or error}") from None
    return keys, np.array(rows, np.int64).reshape(-1, 3)


def intact_entries(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the entries.

    Raises:
        tarfile.ReadError: if the file does not end with the format's block of zeros. Python takes a damaged header for
            the end, and accepts a file that is truncated between two entries.
    """
    yield from archive
    assert archive.fileobj is not None, "it is open"
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no entry and no end at byte {archive.offset:,}")


def _parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """Split an entry's name into its key and its suffix."""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _read_sample(
    archive: tarfile.TarFile, where: str, members: Iterable[tarfile.TarInfo]
) -> tuple[int, int, int] | None:
    """Return the image's offset and size, and its label; None if there is neither image nor label."""
    image = label = None
    for member in members:
        suffix = _parts(member)[1]
        if suffix in IMAGE_SUFFIXES and not member.isdir():
            if not member.isreg():
                raise UserError(
                    f"{where}{suffix} is a link or a device; write the shard again, with files (tar "
                    "--dereference --hard-dereference)"
                )
            if image is not None:
                raise UserError(f"{where} has two images; a sample is one image with its label")
            image = member
        elif suffix in (".cls", ".json") and member.isreg() and member.size <= MAX_LABEL_BYTES and label is None:
            label = _read_label(archive, member, suffix)
    if image is not None and label is not None:
        return image.offset_data, image.size, label
    if image is not None:
        raise UserError(f'{where} has no label; it needs a number from 0 in a .cls or, as "label", in a .json entry')
    if label is not None:
        raise UserError(f"{where} has a label, but no image; an image is named KEY.jpg or KEY.png, without other dots")
    return None


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> int | None:
    file = archive.extractfile(member)
    assert file is not None, "a regular entry"
    try:
        value = json.loads(file.read())
        value = value["label"] if suffix == ".json" else value
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if type(value) is int and 0 <= value < MAX_CLASSES else None
