"""`shards:DIR` or `shards:PATTERN`: tar files in WebDataset's format. Images are read from their place in the shard.

`DIR/train/*.tar` and `DIR/val/*.tar`, or `DIR/*.tar` with the words train and val in their names, or a pattern with
`{split}`. Images are ordered by key, so that their order does not depend on how they are divided into shards.
"""

import errno
import functools
import glob
import io
import itertools
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from resnet_in1k.data.dataset import SPLIT_NAMES, Source, SourceFacts, Split, fingerprint_of
from resnet_in1k.data.tar_index import Shard, index_shards
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

CLASSES_NAME = "classes.json"
"""Next to the shards, or above a split's folder: the class names, in the order of the labels."""
PLAN_NAME = "plan.json"
"""Next to shards by prepare_data.py: the images they are made of, and how many are in a shard."""
MAX_OPEN_SHARDS = 256
"""Limit for one process; the system's limit of open files is usually 1,024."""
READ_AHEAD_BYTES = 128 << 10
"""Linux's default: one request to the kernel reads no more."""
LEFT_AFTER_READS = 1000
"""A shard that was not read this many times in a row has left the window. It is read again in a later epoch, and may
have been dropped from memory by then."""


@dataclass(frozen=True, kw_only=True)
class ShardSource(Source):
    """Images in tar shards."""

    shards: tuple[Shard, ...]
    shard_of: np.ndarray
    """(N,) int64, index into shards."""
    offsets: np.ndarray
    """(N,) int64, position in the shard, in bytes."""
    sizes: np.ndarray
    """(N,) int64, in bytes."""
    in_windows: bool = False
    """The sampler reads a few shards at a time: a shard is read ahead at its first image, and the fingerprint includes
    the shard of each image."""

    def take(self, indices: np.ndarray, split: Split) -> Source:
        places = {name: getattr(self, name)[indices] for name in ("shard_of", "offsets", "sizes")}
        return replace(super().take(indices, split), **places)

    def read(self, index: int) -> np.ndarray:
        shard, offset = self.shards[self.shard_of[index]], int(self.offsets[index])
        data = np.empty(self.sizes[index], dtype=np.uint8)
        try:
            descriptor = _open_shard(shard).fileno()
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
                raise OSError(errno.ENODATA, f"{shard.path} has changed since it was indexed; rerun to index it again")
            if self.in_windows:
                _read_ahead(shard, descriptor)
            view = memoryview(data)
            while view:
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise OSError(errno.ENODATA, f"{shard.path} is truncated: it ends at byte {offset:,}")
                view, offset = view[count:], offset + count
        except OSError:
            _open_shard.cache_clear()  # a retry opens the shard again
            raise
        return data

    def image_name(self, index: int) -> str:
        return f"{self.shards[self.shard_of[index]].path}:{os.fsdecode(self.keys[index])}"

    def fingerprint(self) -> str:
        arrays = [self.labels, self.sizes, self.keys.blob, self.keys.ends]
        return fingerprint_of(self.class_names, *arrays, *([self.shard_of] if self.in_windows else []))


@functools.lru_cache(MAX_OPEN_SHARDS)
def _open_shard(shard: Shard) -> io.FileIO:
    # A shard that was replaced and indexed again is another key here, so it is opened again. A file that leaves the
    # cache closes itself. Each read passes its offset, so workers share the files that they inherit.
    return open(shard.path, "rb", buffering=0)


_num_reads = itertools.count()
_last_read: dict[Shard, int] = {}


def _read_ahead(shard: Shard, descriptor: int) -> None:
    """Have the kernel read the shard into memory, without waiting for it, when its window begins."""
    number = next(_num_reads)
    if number - _last_read.get(shard, -LEFT_AFTER_READS) >= LEFT_AFTER_READS and hasattr(os, "posix_fadvise"):
        for offset in range(0, shard.size, READ_AHEAD_BYTES):
            os.posix_fadvise(descriptor, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    _last_read[shard] = number


def facts(data: str) -> SourceFacts:
    place = Path(data.removeprefix("shards:"))
    name = place.parent.name if _is_pattern(str(place)) else place.name
    return SourceFacts(name or "shards", shlex.quote(f"shards:path/to/{place.name}"))


def open_split(data: str, split: Split) -> ShardSource:
    return _open(data, split, find_shards(data, split))


def open_whole(data: str) -> ShardSource:
    """Open `DIR/train/*.tar` or `DIR/*.tar`, or all shards of a pattern; raises UserError if there is a val split."""
    if find_shards(data, "val"):
        raise UserError(f"--val-share: {data} has a val split; omit --val-share, or name the shards by a pattern")
    return _open(data, "train", find_shards(data))


def _open(data: str, split: Split, shards: list[Path]) -> ShardSource:
    if not shards:
        raise UserError(
            f"--data {data}: no shards of the {split} split; they belong in DIR/{split}/*.tar, or in DIR with the word "
            f"{split} in their names, or are named by a pattern with {{split}}; without a val split give --val-share"
        )
    place, training = data.removeprefix("shards:"), find_shards(data, "train")
    if split == "val" and (both := sorted(set(shards) & set(training))):
        raise UserError(f"--data {data}: {both[0]} is in both splits by its name; name them by a pattern")
    if not _is_pattern(place) or os.path.basename(place) == "*.tar":  # another pattern may choose some of the shards
        for folder in {shard.parent for shard in (*shards, *training)}:
            _check_complete(folder)
    fields, folder = index_shards(shards), shards[0].parent
    label_names, class_names = fields.pop("label_names"), read_class_names(folder / CLASSES_NAME)
    # A file above the folder counts only for a folder of one split: above others it may belong to other data.
    if class_names is None and any(folder.name in names for names in SPLIT_NAMES.values()):
        class_names = read_class_names(folder.parent / CLASSES_NAME)
    if class_names is None:  # by the labels of the training split, which are texts or numbers
        of_train = index_shards(training or shards)
        class_names = of_train["label_names"] or [str(label) for label in range(of_train["labels"].max() + 1)]
    if unknown := [name for name in label_names if name not in class_names]:
        advice = f"list all classes in {CLASSES_NAME} next to the shards"
        raise UserError(f"--data {data}: {split} has labels of no class: {shorten(unknown)}; {advice}")
    if label_names:
        fields["labels"] = np.array([class_names.index(name) for name in label_names])[fields["labels"]]
    labels = fields["labels"]
    if labels.max() >= len(class_names):
        raise UserError(f"--data {data}: {split} has the label {labels.max()}, but {len(class_names)} classes")
    missing = np.setdiff1d(np.arange(len(class_names)), labels) if split == "train" else ()
    note = f"no training images of {len(missing)} classes, such as {class_names[missing[0]]}" if len(missing) else ""
    return ShardSource(name=data, split=split, class_names=tuple(class_names), note=note, **fields)


def read_class_names(file: Path) -> list[str] | None:
    """Return the names in a classes.json, None if there is no such file; raises UserError for another content."""
    if not file.exists():
        return None
    with files.content_errors(file):
        names = files.read_json(file)
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            raise ValueError("not a list of class names")
    return names


def _is_pattern(place: str) -> bool:
    """True also for the name of one file; False for a folder, which may have such characters in its name."""
    return os.path.isfile(place) or ((glob.has_magic(place) or "{" in place) and not os.path.isdir(place))


def find_shards(data: str, split: Split | None = None) -> list[Path]:
    """Return the sorted shards of one split, see this module; [] if there are none, UserError if some are missing.

    Without `split`, those that `--val-share` divides: the shards of the training split, else all shards.
    """
    place = data.removeprefix("shards:")
    is_pattern = _is_pattern(place)
    if is_pattern and "{split}" not in place:
        return _matching(place) if split is None else []
    for name in SPLIT_NAMES.get(split or "train", (split,)):
        if is_pattern:
            found = _matching(place.replace("{split}", name))
        else:  # the word `train`, not a part of a word as in `retrained`
            found = _in_folder(f"{place}/{name}") or _in_folder(place, rf"(?<![a-z]){name}(?![a-z])")
        if found:
            return found
    return _in_folder(place) if split is None else []


def _in_folder(place: str, name_pattern: str = "") -> list[Path]:
    found = [Path(path) for path in sorted(glob.glob(f"{glob.escape(place)}/*.tar"))]
    return [path for path in found if re.search(name_pattern, path.name, re.IGNORECASE)]


def _matching(pattern: str) -> list[Path]:
    try:
        found = {name: glob.glob(name) for name in braceexpand(pattern, escape=False)}
    except ValueError as error:
        raise UserError(f"shards:{pattern}: {error}; braces are for {{000..123}}, {{a,b}} and {{split}}") from None
    missing = [name for name, paths in found.items() if not paths]
    if 0 < len(missing) < len(found):
        raise UserError(f"{pattern}: {len(missing):,} of {len(found):,} are missing: {shorten(missing)}")
    return sorted(map(Path, set(itertools.chain(*found.values()))))


def planned_shards(plan: dict[str, Any]) -> list[str]:
    """Return the names of the shards that prepare_data.py writes by this plan."""
    return [f"shard-{number:06d}.tar" for number in range(-(-plan["num_images"] // plan["images_per_shard"]))]


def _check_complete(folder: Path) -> None:
    """Raise UserError if some shards of the folder's plan are missing. There may be other shards, or no plan."""
    try:
        names = planned_shards(files.read_json_object(folder / PLAN_NAME) or {})
    except (KeyError, TypeError, ZeroDivisionError):
        return
    present = {path.name for path in folder.iterdir()}
    missing = [name for name in names if name not in present]
    if 0 < len(missing) < len(names):
        few = f"{len(missing):,} of {len(names):,} shards are missing: {shorten(missing)}"
        raise UserError(f"{folder}: {few}; copy them there, or rerun the prepare_data.py command that wrote the others")
