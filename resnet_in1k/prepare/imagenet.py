"""ImageNet-1k from its official archives or from Kaggle's copy, as sources of images.

An image is read from its place in the nested tar files. Every entry is checked before anything is written.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.datasets.imagenet import ARCHIVE_META

from resnet_in1k.data import image_folder
from resnet_in1k.data.dataset import FileSource, PackedBytes, Source, Split
from resnet_in1k.data.tar_index import Shard, intact_entries
from resnet_in1k.data.tar_shards import ShardSource
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.console import progress_bar
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import file_size
from resnet_in1k.utils.pool import run_parallel

MAX_IMAGE_BYTES = 100 << 20
"""ImageNet's largest file has 16 MB."""
MAX_CLASS_BYTES = 10 << 30
MAX_DEVKIT_BYTES = 100 << 20
"""Decompressed; the real one has 5 MB."""
CLASS_NAMES = re.compile(r"n\d{8}\.tar")
TRAIN_NAMES = re.compile(r"[A-Za-z0-9][\w.-]*\.(JPEG|jpe?g|png)")
VAL_NAMES = re.compile(r"ILSVRC2012_val_\d{8}\.(JPEG|jpe?g|png)")
SOLUTION_NAME = "LOC_val_solution.csv"

Refuse = Callable[[str], None]
"""Called with what differs from ImageNet-1k: raises UserError or, with --allow-partial, prints a warning."""


class Archives(NamedTuple):
    train: Path
    val: Path
    devkit: Path


def refuse_partial(problem: str) -> None:
    raise UserError(f"{problem}; download it again, or give --allow-partial if this is intended")


def open_archives(archives: Archives, refuse: Refuse, processes: int) -> tuple[ShardSource, ShardSource]:
    """Open the training and validation images.

    Raises:
        UserError: naming the archive and the entry, if an archive is not as ImageNet's.
    """
    for name, path in archives._asdict().items():
        file_name, expected = ARCHIVE_META[name]
        if (actual := md5_of(path)) != expected:
            refuse(f"{path} is not ImageNet's {file_name}: its md5 is {actual}, not {expected}")
    wnid_of_image = read_devkit(archives.devkit)
    names, places = _list_archive(archives.train, CLASS_NAMES, MAX_CLASS_BYTES)
    class_names = tuple(name.removesuffix(".tar") for name in names)
    list_class = partial(_list_archive, archives.train, TRAIN_NAMES, MAX_IMAGE_BYTES)
    jobs = list(zip(class_names, *places.T.tolist(), strict=True))
    images: dict[str, tuple[list[str], np.ndarray]] = {}
    with progress_bar(len(names), f"entries of {archives.train.name}", "classes") as bar:
        for wnid, listed in zip(class_names, run_parallel(list_class, jobs, processes), strict=True):
            images[wnid] = listed
            bar.update()
    train = _source(archives.train, "train", class_names, images)

    names, places = _list_archive(archives.val, VAL_NAMES, MAX_IMAGE_BYTES)
    members: dict[str, list[int]] = {wnid: [] for wnid in class_names}
    for position, name in enumerate(names):
        wnid = wnid_of_image.get(int(name.removeprefix("ILSVRC2012_val_")[:8]))
        if wnid not in members:
            raise UserError(f"{archives.val}: entry {name!r} has no label in the devkit, or no training images")
        members[wnid].append(position)
    images = {wnid: ([names[i] for i in positions], places[positions]) for wnid, positions in members.items()}
    val = _source(archives.val, "val", class_names, images)
    _check_counts((train, val), refuse)
    return train, val


def _list_archive(
    path: Path, pattern: re.Pattern[str], max_bytes: int, inner: tuple[str, int, int] = ("", 0, 0)
) -> tuple[list[str], np.ndarray]:
    """List a tar file or, with `inner`, the archive of a class in it: its WordNet id, offset and size.

    Returns:
        The names of the entries, sorted; their offsets in the file and their sizes, (n, 2) int64.

    Raises:
        UserError: naming the first entry that is not a file with such a name and size, or if the archive is truncated.
    """
    wnid, start, size = inner
    where, places = f"{path}: {wnid}.tar" if wnid else str(path), dict[str, tuple[int, int]]()
    try:
        with contextlib.ExitStack() as opened:
            archive = opened.enter_context(tarfile.open(path, "r:"))
            if wnid:
                part = tarfile.TarInfo()
                part.offset_data, part.size = start, size
                archive = opened.enter_context(tarfile.open(fileobj=archive.extractfile(part), mode="r:"))
            for member in intact_entries(archive):
                problems = {
                    "is not a regular file": not member.isreg() or member.issparse(),
                    "does not have a name as in ImageNet": not pattern.fullmatch(member.name),  # such as ../outside
                    f"has an impossible size, {file_size(member.size)}": not 0 < member.size <= max_bytes,
                    "is there twice": member.name in places,
                }
                for problem, is_true in problems.items():
                    if is_true:
                        raise UserError(f"{where}: entry {member.name!r} {problem}; this is not ImageNet's archive")
                places[member.name] = start + member.offset_data, member.size
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{where} is truncated or not a tar file ({error}); download it again") from None
    if not places:
        raise UserError(f"{where}: no entries in it; download it again")
    names = sorted(places)
    return names, np.array([places[name] for name in names], dtype=np.int64)


def _source(
    path: Path, split: Split, class_names: tuple[str, ...], images: dict[str, tuple[list[str], np.ndarray]]
) -> ShardSource:
    """`images`: names and places by class, see `_list_archive`."""
    keys = PackedBytes(f"{wnid}/{name}".encode() for wnid in class_names for name in images[wnid][0])
    labels = np.repeat(np.arange(len(class_names)), [len(images[wnid][0]) for wnid in class_names])
    offsets, sizes = np.concatenate([images[wnid][1] for wnid in class_names]).T.copy()
    places = {"shards": (Shard.of(path),), "shard_of": np.zeros_like(labels), "offsets": offsets, "sizes": sizes}
    return ShardSource(name=str(path), split=split, class_names=class_names, labels=labels, keys=keys, **places)


def read_devkit(path: Path) -> dict[int, str]:
    """Return the WordNet ids of validation images 1, 2, 3 …

    torchvision's own parser unpacks the archive unchecked, and accepts the original only.

    Raises:
        UserError: if the file is not ImageNet's development kit.
    """
    import scipy.io

    try:
        with gzip.open(path) as stream:
            unpacked = stream.read(MAX_DEVKIT_BYTES + 1)
        if len(unpacked) > MAX_DEVKIT_BYTES:
            raise UserError(f"{path} unpacks to over {file_size(MAX_DEVKIT_BYTES)}; this is not ImageNet's devkit")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            entries = {Path(member.name).name: member for member in archive if member.isreg()}
            meta, truth = (
                archive.extractfile(entries[name]).read()
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        synsets = np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = [row for row in synsets if row["num_children"] == 0]  # the other synsets are above the classes
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        return {image: wnids.get(int(line), "") for image, line in enumerate(truth.split(), start=1)}
    except KeyError as error:
        raise UserError(f"{path}: no {error} in it; this is not ImageNet's devkit of tasks 1 and 2") from None
    except (tarfile.TarError, EOFError, OSError, ValueError, TypeError, IndexError, zlib.error) as error:
        raise UserError(f"{path} is truncated or not ImageNet's devkit ({error}); download it again") from None


def _check_counts(sources: Iterable[Source], refuse: Refuse) -> None:
    for source, expected in zip(sources, (imagenet.NUM_TRAIN_IMAGES, imagenet.NUM_VAL_IMAGES), strict=True):
        if len(source) != expected:
            refuse(f"{len(source):,} {source.split} images in {source.name}, where ImageNet has {expected:,}")
        if source.split == "train" and list(source.class_names) != list(imagenet.names_by_wnid()):
            refuse(f"{len(source.class_names):,} classes in {source.name}, which are not ImageNet-1k's 1,000")


def md5_of(path: Path) -> str:
    """Return the md5 sum of a file; cached, as 138 GB take minutes, while size, times and inode are the same."""
    try:
        status, cache = path.stat(), files.cache_file("md5", [path], ".json")
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        cached = files.read_json_object(cache) or {}
        if cached.get("stamp") == stamp and "md5" in cached:
            return str(cached["md5"])
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file, progress_bar(status.st_size >> 20, f"md5 of {path.name}", "MB") as bar:
            while block := file.read(16 << 20):
                digest.update(block)
                bar.update(len(block) >> 20)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    with contextlib.suppress(OSError):  # without a cache the next run computes the sum again
        cache.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(cache, {"stamp": stamp, "md5": digest.hexdigest()})
    return digest.hexdigest()


def open_kaggle(folder: Path, refuse: Refuse) -> tuple[FileSource, FileSource]:
    """Open the training and validation images of the folder with Kaggle's unpacked archive.

    Raises:
        UserError: naming what is missing or inconsistent.
    """
    images, solution = folder / "ILSVRC/Data/CLS-LOC", folder / SOLUTION_NAME
    if not images.is_dir() or not solution.is_file():
        raise UserError(f"{folder}: Kaggle's layout has ILSVRC/Data/CLS-LOC/ and {SOLUTION_NAME} in it")
    train = image_folder.open_split(str(images), "train")
    try:
        with solution.open(newline="", encoding="utf-8") as file:
            wnids = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        present = {Path(name).stem: name for name in os.listdir(images / "val") if not name.startswith(".")}
    except (OSError, KeyError, IndexError, AttributeError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{solution} cannot be read ({type(error).__name__}: {error})") from None
    if unpaired := sorted(present.keys() ^ wnids.keys()):
        where = f"no image in {images / 'val'}" if unpaired[0] in wnids else f"no line in {solution}"
        raise UserError(f"{unpaired[0]}: {where}")
    label_of = {wnid: label for label, wnid in enumerate(train.class_names)}
    for name, wnid in wnids.items():
        if wnid not in label_of:
            raise UserError(f"{solution}: {name} has the class {wnid}, which has no folder in {images / 'train'}")
    rows = sorted((label_of[wnid], present[name]) for name, wnid in wnids.items())
    val = FileSource(
        name=str(images),
        split="val",
        class_names=train.class_names,
        labels=np.array([label for label, _ in rows], dtype=np.int64),
        keys=PackedBytes(os.fsencode(name) for _, name in rows),
        folder=images / "val",
    )
    _check_counts((train, val), refuse)
    return train, val
