"""ImageNet-1k from its official archives or from Kaggle's copy, as sources of images.

An image is read from its place in the nested tar files. Every entry is checked before anything is written.
"""

import gzip
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets.imagenet import ARCHIVE_META

from resnet_in1k.data.dataset import PackedBytes, Source, Split
from resnet_in1k.data.image_folder import FileSource, open_split
from resnet_in1k.data.tar_index import Shard, intact_entries
from resnet_in1k.data.tar_shards import ShardSource
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.console import progress_bar
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.pool import run_parallel

MAX_IMAGE_BYTES = 100 << 20
"""ImageNet's largest file has 16 MB."""
MAX_CLASS_BYTES = 10 << 30
MAX_DEVKIT_BYTES = 100 << 20
"""Decompressed; the real one has 5 MB."""
CLASS_NAMES = re.compile(r"n\d{8}\.tar")
TRAIN_NAMES = re.compile(r"[A-Za-z0-9][\w.-]*\.(JPEG|jpe?g|png)")
VAL_NAMES = re.compile(r"ILSVRC2012_val_\d{8}\.(JPEG|jpe?g|png)")

Entry = tuple[str, int, int]
"""Name, offset in the file and size in bytes."""


@dataclass(frozen=True, kw_only=True)
class ArchiveSource(ShardSource):
    """Images in an archive; their keys are `<class>/<file name>`."""


def open_archives(train: Path, val: Path, devkit: Path, processes: int) -> tuple[ArchiveSource, ArchiveSource]:
    """Open the training and validation images; raises UserError with the archive and the entry that are damaged."""
    wnid_of_image = read_devkit(devkit)
    classes = _list_archive(train, CLASS_NAMES, MAX_CLASS_BYTES)
    images: dict[str, list[Entry]] = {}
    with progress_bar(len(classes), f"entries of {train.name}", "classes") as bar:
        list_class = partial(_list_archive, train, TRAIN_NAMES, MAX_IMAGE_BYTES)
        for (name, *_), listed in zip(classes, run_parallel(list_class, classes, processes), strict=True):
            images[name.removesuffix(".tar")] = listed
            bar.update()
    val_images: dict[str, list[Entry]] = {wnid: [] for wnid in images}
    for entry in _list_archive(val, VAL_NAMES, MAX_IMAGE_BYTES):
        wnid = wnid_of_image.get(int(entry[0].removeprefix("ILSVRC2012_val_")[:8]))
        if wnid not in val_images:
            raise UserError(f"{val}: entry {entry[0]!r} has no label in the devkit, or no training images")
        val_images[wnid].append(entry)
    return _source(train, "train", images), _source(val, "val", val_images)


def _list_archive(path: Path, pattern: re.Pattern[str], max_bytes: int, inner: Entry = ("", 0, 0)) -> list[Entry]:
    """Return the sorted entries of a tar file or, with `inner`, of a tar file in it; raises UserError for the first one
    that is not a file with such a name and size, and if the archive is truncated."""
    name, start, size = inner
    where, entries = f"{path}: {name}" if name else str(path), dict[str, Entry]()
    try:
        with path.open("rb") as file:
            file.seek(start)  # tarfile begins where the file is; its offsets count from the start of the file
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in intact_entries(archive):
                    is_file = member.isreg() and not member.issparse() and 0 < member.size <= max_bytes
                    # A name may be hostile, such as ../outside.
                    if not is_file or not pattern.fullmatch(member.name) or member.name in entries:
                        raise UserError(
                            f"{where}: entry {member.name!r} of {member.size:,} bytes is not as in ImageNet: a "
                            "regular file with this kind of name and size, there once; download the archive again"
                        )
                    entries[member.name] = member.name, member.offset_data, member.size
                if name and archive.offset + tarfile.BLOCKSIZE > start + size:
                    raise ValueError("its end is missing")
            if not entries:
                raise ValueError("no entries in it")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{where} is truncated or not a tar file ({error}); download it again") from None
    return sorted(entries.values())


def _source(path: Path, split: Split, images: dict[str, list[Entry]]) -> ArchiveSource:
    """Open the images of each class, in the order of their names."""
    keys = PackedBytes(f"{wnid}/{name}".encode() for wnid, entries in images.items() for name, *_ in entries)
    labels = np.repeat(np.arange(len(images)), list(map(len, images.values())))
    offsets, sizes = (
        np.array([entry[place] for entries in images.values() for entry in entries], dtype=np.int64) for place in (1, 2)
    )
    places = {"shards": (Shard.of(path),), "shard_of": np.zeros_like(labels), "offsets": offsets, "sizes": sizes}
    return ArchiveSource(name=str(path), split=split, class_names=tuple(images), labels=labels, keys=keys, **places)


def read_devkit(path: Path) -> dict[int, str]:
    """Return the WordNet ids of validation images 1, 2, 3 …; raises UserError for another file than the devkit."""
    import scipy.io

    # torchvision's own parser unpacks the archive unchecked, and accepts the original only.
    try:
        with gzip.open(path) as stream:
            unpacked = io.BytesIO(stream.read(MAX_DEVKIT_BYTES))  # a small file may unpack to a terabyte
        with tarfile.open(fileobj=unpacked, mode="r:") as archive:
            entries = {Path(member.name).name: archive.extractfile(member) for member in archive if member.isreg()}
            synsets = scipy.io.loadmat(entries["meta.mat"], squeeze_me=True)["synsets"]
            numbers = entries["ILSVRC2012_validation_ground_truth.txt"].read().split()
        leaves = [row for row in synsets if row["num_children"] == 0]  # the other synsets are above the classes
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        return {image: wnids.get(int(number), "") for image, number in enumerate(numbers, start=1)}
    except Exception as error:  # gzip, tarfile and scipy share no base class of errors
        raise UserError(f"{path} is truncated or not ImageNet's devkit ({error!r}); download it again") from None


def open_kaggle(folder: Path) -> tuple[FileSource, FileSource]:
    """Open the images of Kaggle's unpacked archive; raises UserError with what is missing or inconsistent."""
    images, solution = folder / "ILSVRC/Data/CLS-LOC", folder / "LOC_val_solution.csv"
    if not images.is_dir() or not solution.is_file():
        raise UserError(f"{folder}: Kaggle's layout has ILSVRC/Data/CLS-LOC/ and LOC_val_solution.csv in it")
    train = open_split(str(images), "train")
    label_of = {wnid: label for label, wnid in enumerate(train.class_names)}
    with files.content_errors(solution):  # lines such as ILSVRC2012_val_00048981,n03995372 85 1 499 272
        rows = [line.split(",") for line in files.read_text(solution).splitlines()[1:]]
        wnids = {image: boxes.split()[0] for image, boxes in rows}
    present = {path.stem: path.name for path in (images / "val").glob("[!.]*")}
    if unpaired := sorted(present.keys() ^ wnids.keys()):
        raise UserError(f"{unpaired[0]} is in only one of {images / 'val'} and {solution}; unpack the archive again")
    if unknown := sorted(set(wnids.values()) - label_of.keys()):
        raise UserError(f"{solution}: the class {unknown[0]} has no folder in {images / 'train'}")
    val = sorted((label_of[wnid], present[image]) for image, wnid in wnids.items())
    return train, replace(
        train,
        split="val",
        labels=np.array([label for label, _ in val], dtype=np.int64),
        keys=PackedBytes(os.fsencode(name) for _, name in val),
        folder=images / "val",
        note="",
    )


def differences(train: Source, val: Source, archives: Sequence[Path]) -> Iterator[str]:
    """Yield what is not as in ImageNet-1k: the images and classes, and the checksums of the archives, if given."""
    if (len(train), len(val)) != (imagenet.NUM_TRAIN_IMAGES, imagenet.NUM_VAL_IMAGES):
        yield (
            f"{len(train):,} train images in {train.name} and {len(val):,} val images in {val.name}, where ImageNet "
            f"has {imagenet.NUM_TRAIN_IMAGES:,} and {imagenet.NUM_VAL_IMAGES:,}"
        )
    if list(train.class_names) != list(imagenet.names_by_wnid()):
        yield f"the {len(train.class_names):,} classes in {train.name} are not ImageNet-1k's 1,000"
    for path, (name, expected_md5) in zip(archives, ARCHIVE_META.values(), strict=False):
        with files.content_errors(path):
            actual = md5_of(path)
        if actual != expected_md5:
            yield f"{path} is not ImageNet's {name}: its md5 is {actual}, not {expected_md5}"


def md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    num_megabytes = path.stat().st_size >> 20
    with path.open("rb") as file, progress_bar(num_megabytes, f"md5 of {path.name}", "MB") as bar:
        while block := file.read(16 << 20):
            digest.update(block)
            bar.update(len(block) >> 20)
    return digest.hexdigest()
