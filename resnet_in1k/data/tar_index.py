"""The index of tar shards: the place and label of each image, found by one pass over the shards and cached.

The format is WebDataset's (https://github.com/webdataset/webdataset): a sample is a run of entries with one key, the
name up to its first dot. It has an image and its label, a number or text in `.cls` or, under `label`, in `.json`.
"""

import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_in1k.data.dataset import PackedBytes, read_cache, write_cache
from resnet_in1k.data.formats import LEFTOVERS, image_suffixes
from resnet_in1k.utils.console import progress_bar
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import content_errors
from resnet_in1k.utils.pool import run_parallel

MAX_LABEL_BYTES = 1 << 20
"""Larger `.cls` and `.json` entries are ignored."""
LABEL_SUFFIXES = (".cls", ".json")
MAX_CLASSES = 1_000_000
"""A larger label is something else, such as a hash."""
MAX_NAME_CHARACTERS = 200
"""A longer text is no class name."""


class Shard(NamedTuple):
    """A tar file as it was when it was indexed."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "Shard":
        with content_errors(path):
            status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)


def index_shards(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the fields of a ShardSource with all images of some shards, sorted by key, then by shard and offset; and
    `label_names`, the sorted texts that the labels are positions in, [] for labels that are numbers.

    The index is cached, and made again if a shard has changed.

    Raises:
        UserError: naming the shard, if it cannot be read, is incomplete, or has an image without a label.
    """
    from resnet_in1k.utils.device import usable_cores  # imports psutil, which prediction does not need

    shards = tuple(map(Shard.of, paths))
    stamps, cached = [[shard.size, shard.mtime_ns] for shard in shards], read_cache(paths)
    if cached and cached[0]["stamps"] == stamps:
        return {"shards": shards, "label_names": cached[0].get("label_names", []), **cached[1]}
    keys, rows, labels = list[bytes](), list[np.ndarray](), list[int | str]()
    with progress_bar(len(paths), f"index of {paths[0].parent}", "shards") as bar:
        for keys_of_shard, rows_of_shard, labels_of_shard in run_parallel(read_shard, paths, usable_cores()):
            keys += keys_of_shard
            labels += labels_of_shard
            rows.append(rows_of_shard)
            bar.update()
    if not keys:
        raise UserError(f"{paths[0].parent}: no images with labels in the {len(paths)} shards")
    order = sorted(range(len(keys)), key=keys.__getitem__)  # stable: equal keys stay in the order of the shards
    offsets, sizes = np.concatenate(rows)[order].T.copy()
    names = sorted(set(map(str, labels))) if any(isinstance(label, str) for label in labels) else []
    numbers = {name: number for number, name in enumerate(names)}
    fields = {
        "keys": PackedBytes(map(keys.__getitem__, order)),
        "shard_of": np.repeat(np.arange(len(paths)), [len(each) for each in rows])[order],
        "offsets": offsets,
        "sizes": sizes,
        "labels": np.array([numbers[str(label)] if names else label for label in labels], np.int64)[order],
    }
    write_cache(paths, {"stamps": stamps, "label_names": names}, **fields)
    return {"shards": shards, "label_names": names, **fields}


def read_shard(shard: Path) -> tuple[list[bytes], np.ndarray, list[int | str]]:
    """Return the keys of a shard's images, their offsets and sizes, (n, 2) int64, and their labels.

    Raises:
        UserError: if it is not a complete tar file, or has an image without a label or a label without an image.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            members = [member for member in intact_entries(archive) if not _is_hidden(member.name)]
            samples, problem = [], None
            for cut in (str.partition, str.rpartition):  # keys may have dots, as in img.0001.jpg
                try:
                    samples = samples or _read_samples(archive, shard, members, cut)
                except UserError as error:
                    problem = problem or error
            if problem and not samples:
                raise problem
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shard} is not a complete, readable tar file ({error}); copy it again") from None
    keys = [key.encode("utf-8", "surrogateescape") for key, *_ in samples]
    places = np.array([sample[1:3] for sample in samples], np.int64).reshape(-1, 2)
    return keys, places, [label for *_, label in samples]


def _is_hidden(name: str) -> bool:
    """True for what a Mac or a storage system adds, such as ._KEY.jpg next to KEY.jpg."""
    return any((part.startswith(".") and part.strip(".")) or LEFTOVERS.fullmatch(part) for part in name.split("/"))


def intact_entries(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the entries; raise tarfile.ReadError if the file does not end with the format's block of zeros.

    Python takes a damaged header for the end, and accepts a file that is truncated between two entries.
    """
    yield from archive
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no entry and no end at byte {archive.offset:,}")


Cut = Callable[[str, str], tuple[str, str, str]]


def _parts(path: str, cut: Cut) -> tuple[str, str]:
    """Split an entry's name into its key and its suffix."""
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = cut(name, ".")
    return folder + slash + stem, (dot + suffix).lower()


def _read_samples(
    archive: tarfile.TarFile, shard: Path, members: Sequence[tarfile.TarInfo], cut: Cut
) -> list[tuple[str, int, int, int | str]]:
    """Return the key, offset, size and label of each image; raises UserError for an image or a label alone."""
    groups, incomplete = list[tuple[str, list[tarfile.TarInfo]]](), dict[str, list[tarfile.TarInfo]]()
    for key, group in itertools.groupby(members, key=lambda member: _parts(member.name, cut)[0]):
        entries = list(group)
        suffixes = {_parts(member.name, cut)[1] for member in entries}
        if suffixes.isdisjoint(image_suffixes()) or suffixes.isdisjoint(LABEL_SUFFIXES):
            incomplete.setdefault(key, []).extend(entries)  # in a shard that is not sorted by name
        else:
            groups.append((key, entries))
    found = [(key, _read_sample(archive, f"{shard}: {key}", each, cut)) for key, each in [*groups, *incomplete.items()]]
    return [(key, *sample) for key, sample in found if sample]


def _read_sample(
    archive: tarfile.TarFile, where: str, members: Iterable[tarfile.TarInfo], cut: Cut
) -> tuple[int, int, int | str] | None:
    """Return the image's offset and size, and its label; None if there is neither image nor label."""
    images, label = list[tarfile.TarInfo](), None
    for member in members:
        suffix = _parts(member.name, cut)[1]
        if suffix in image_suffixes() and not member.isdir():
            images.append(member)
        elif suffix in LABEL_SUFFIXES and member.isreg() and member.size <= MAX_LABEL_BYTES and label is None:
            label = _read_label(archive, member, suffix)
    if not images and label is None:
        return None
    if not images:
        raise UserError(f"{where} has a label, but no image; an image is named KEY.jpg or KEY.png, without other dots")
    if len(images) > 1:
        raise UserError(f"{where} has two images; a sample is one image with its label")
    if not images[0].isreg():
        advice = "write the shard again, with files (tar --dereference --hard-dereference)"
        raise UserError(f"{where}: its image is a link or a device; {advice}")
    if label is None:
        raise UserError(f'{where} has no label; it needs a number from 0 or a name in a .cls or .json ("label")')
    return images[0].offset_data, images[0].size, label


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> int | str | None:
    content = archive.extractfile(member).read()
    try:
        value = json.loads(content)
        value = value["label"] if suffix == ".json" else value
    except (ValueError, KeyError, TypeError, RecursionError):
        value = content.decode(errors="surrogateescape").strip() if suffix == ".cls" else None
    if isinstance(value, str):
        return value if value.isprintable() and 0 < len(value) <= MAX_NAME_CHARACTERS else None
    return value if type(value) is int and 0 <= value < MAX_CLASSES else None
