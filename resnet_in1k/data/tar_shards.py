"""`shards:DIR` or `shards:PATTERN`: tar files in WebDataset's convention, read image by image where each lies.

`DIR/train/*.tar` and `DIR/val/*.tar`, or `DIR/*.tar` with the words train and val in their names; a pattern has
`{split}` where the two differ. Images are ordered by their keys, so that it does not matter which shard one is in.
"""

import errno
import functools
import hashlib
import os
import shlex
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from resnet_in1k.data.dataset import SourceFacts, Split
from resnet_in1k.data.tar_index import ShardIndex, forget_index, index_shards
from resnet_in1k.data.tar_paths import SPLIT_NAMES, has_splits, is_pattern, shards_of_split, shards_of_whole
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError

PREFIX = "shards:"
CLASSES_NAME = "classes.json"
"""Beside the shards or above them: the class names, in the order of the labels."""
READ_AHEAD_BYTES = 128 << 10
"""Linux's default read-ahead."""
LEFT_AFTER_READS = 1000
"""A shard that a thread has not read for so many reads is out of the window; when it is read again, another epoch has
begun, and it may be out of memory."""
MAX_OPEN_SHARDS = 4096
"""In each thread that reads."""


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """A split in tar shards."""

    name: str
    split: Split
    class_names: tuple[str, ...]
    index: ShardIndex
    note: str = ""
    in_windows: bool = False
    """Read by an order that goes through a few shards at a time: each is asked for as a whole when its first image is
    read, and which shard an image is in is part of the fingerprint."""

    @property
    def labels(self) -> np.ndarray:
        return self.index.labels

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> bytes:
        return self.index.keys[index]

    def take(self, indices: np.ndarray, split: Split) -> "ShardSource":
        return replace(self, split=split, index=self.index.take(indices))

    def read(self, index: int) -> np.ndarray:
        shard = int(self.index.shard_of[index])
        path, data = self.index.shards[shard], np.empty(self.index.sizes[index], dtype=np.uint8)
        try:
            descriptor = _open_shards.get(path, self.in_windows)
            if not self._is_as_indexed(shard, descriptor):
                _open_shards.close(path)  # it may have been written anew since it was opened, and indexed then
                descriptor = _open_shards.get(path, self.in_windows)
            if not self._is_as_indexed(shard, descriptor):
                raise OSError(errno.ENODATA, f"{path} has changed since it was indexed; start again to index it anew")
            _read_fully(descriptor, data, int(self.index.offsets[index]), path)
        except OSError:
            _open_shards.close(path)  # a retry opens it anew
            raise
        return data

    def _is_as_indexed(self, shard: int, descriptor: int) -> bool:
        status = os.fstat(descriptor)
        return (status.st_size, status.st_mtime_ns) == tuple(self.index.stats[shard].tolist())

    def image_name(self, index: int) -> str:
        key = self.index.keys[index].decode("utf-8", "surrogateescape")
        return f"{self.index.shards[int(self.index.shard_of[index])]}:{key}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        for values in (self.index.labels, self.index.sizes):
            digest.update(values)
        self.index.keys.update(digest)
        if self.in_windows:
            digest.update(self.index.shard_of)
        return digest.hexdigest()


def _read_fully(descriptor: int, data: np.ndarray, offset: int, path: str) -> None:
    view, done = memoryview(data), 0
    while done < len(data):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise OSError(errno.ENODATA, f"{path} is cut off: it ends before byte {offset + len(data):,}")
        done += count


def _ask_for_all(descriptor: int) -> None:
    """Have the kernel read the whole file, without waiting for it; of one call it reads no more than its read-ahead."""
    if hasattr(os, "posix_fadvise"):
        for offset in range(0, os.fstat(descriptor).st_size, READ_AHEAD_BYTES):
            os.posix_fadvise(descriptor, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


class _OpenShard:
    """Closed when nothing refers to it any more."""

    def __init__(self, path: str):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _OpenShards(threading.local):
    """The shards that this thread has open, the last used at the end. A position is part of each read, so forked
    workers may share what was open before."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, _OpenShard] = OrderedDict()
        self._num_reads = 0
        self._last_read: dict[str, int] = {}
        """Of shards that were closed in between, too: a window may have more than can be open."""

    def get(self, path: str, read_ahead: bool) -> int:
        if path not in self._files:
            while len(self._files) >= _max_open_shards():
                self._files.popitem(last=False)
            self._files[path] = _OpenShard(path)
        self._files.move_to_end(path)
        descriptor, self._num_reads = self._files[path].descriptor, self._num_reads + 1
        if read_ahead:
            if self._num_reads - self._last_read.get(path, -LEFT_AFTER_READS) > LEFT_AFTER_READS:
                _ask_for_all(descriptor)
            self._last_read[path] = self._num_reads
        return descriptor

    def close(self, path: str) -> None:
        self._files.pop(path, None)


@functools.cache
def _max_open_shards() -> int:
    """A third of the files that a process may have open, as two threads may read: 341 of the usual 1,024."""
    try:
        import resource  # not on all systems
    except ImportError:
        return 128
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(1, min(MAX_OPEN_SHARDS, limit // 3))


_open_shards = _OpenShards()


def facts(data: str) -> SourceFacts:
    place = Path(_place(data))
    name = place.parent.name if is_pattern(str(place)) else place.name
    limits = ("Who took the training images, where and of what, is not recorded here: neither is their bias.",)
    return SourceFacts(name=name or "shards", data_flag=shlex.quote(f"{PREFIX}path/to/{name}"), limits=limits)


def open_split(data: str, split: Split) -> ShardSource:
    shards = shards_of_split(_place(data), split)
    if not shards:
        without = "; for images without a val split give --val-share" if split == "val" else ""
        raise UserError(
            f"--data {data}: no shards of the {split} split; they belong in DIR/{split}/*.tar, or in DIR with the word "
            f"{split} in their names, or are named by a pattern with {{split}} in it{without}"
        )
    training = shards_of_split(_place(data), "train") if split == "val" else shards
    if split == "val" and (both := sorted(set(shards) & set(training))):
        raise UserError(f"--data {data}: {both[0]} is in both splits by its name; name them by a pattern")
    return _open(data, split, shards, training)


def open_whole(data: str) -> ShardSource:
    """Of `DIR/train/*.tar` or `DIR/*.tar` alone, or of all that a pattern names."""
    place = _place(data)
    if has_splits(place) and shards_of_split(place, "val"):
        raise UserError(f"--val-share: {data} has a val split; leave it out, or name the shards to divide by a pattern")
    shards = shards_of_whole(place)
    if not shards:
        raise UserError(f"--data {data}: no shards there; they belong in DIR/train/*.tar or DIR/*.tar")
    return _open(data, "train", shards, shards)


def _open(data: str, split: Split, shards: list[Path], training: list[Path]) -> ShardSource:
    """`training`: the shards of the training split, if they are known."""
    index = index_shards(shards)
    class_names = _class_names(shards)
    if class_names is None:  # named by number, as many as the training split has
        labels = index.labels if training in ([], shards) else index_shards(training).labels
        class_names = [str(label) for label in range(int(labels.max()) + 1)]
    largest = int(index.labels.max())
    if largest >= len(class_names):
        raise UserError(
            f"--data {data}: label {largest} in the {split} split, but {len(class_names)} classes; labels count from 0"
        )
    missing = np.setdiff1d(np.arange(len(class_names)), index.labels) if split == "train" else ()
    note = f"no training images of {len(missing)} classes, such as {class_names[missing[0]]}" if len(missing) else ""
    return ShardSource(name=data, split=split, class_names=tuple(class_names), index=index, note=note)


def forget(data: str) -> None:
    """Nothing that was found before is used: for `--rescan`."""
    place = _place(data)
    splits = SPLIT_NAMES if has_splits(place) else ()
    for shards in (shards_of_whole(place), *(shards_of_split(place, split) for split in splits)):
        forget_index(shards)


def _place(data: str) -> str:
    """The folder or pattern."""
    return data.removeprefix(PREFIX)


def _class_names(shards: list[Path]) -> list[str] | None:
    beside = shards[0].parent
    # Above them only where they lie in folders of their splits: what else is there need not be theirs.
    is_of_split = any(beside.name in names for names in SPLIT_NAMES.values())
    for folder in (beside, beside.parent) if is_of_split else (beside,):
        file = folder / CLASSES_NAME
        if not file.is_file():
            continue
        try:
            names = files.read_json(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); it is a list of the class names") from None
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            raise UserError(f"{file} is no list of class names")
        return names
    return None
