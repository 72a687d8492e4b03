"""ImageNet's own three archives as sources of images: where each lies in the nested tar files, and its label.

Every entry is checked before anything is written anywhere.
"""

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.imagenet import ARCHIVE_META

from resnet_in1k.data.dataset import PackedBytes, Source
from resnet_in1k.data.tar_index import ShardIndex, whole
from resnet_in1k.data.tar_shards import ShardSource
from resnet_in1k.prepare.checksums import md5_of
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import file_size
from resnet_in1k.utils.pool import Progress, run_parallel

MAX_IMAGE_BYTES = 100 << 20
"""ImageNet's largest file has 16 MB."""
MAX_DEVKIT_BYTES = 200 << 20
"""Decompressed; the real one has 5 MB."""
META_NAME, TRUTH_NAME = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_CLASS_ARCHIVE = re.compile(r"(n\d{8})\.tar")
_IMAGE = re.compile(r"[A-Za-z0-9][\w.-]*\.(JPEG|jpe?g|png)")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.(JPEG|jpe?g|png)")


@dataclass(frozen=True)
class Archives:
    """The three files."""

    train: Path
    val: Path
    devkit: Path

    @property
    def by_name(self) -> dict[str, Path]:
        return {"train": self.train, "val": self.val, "devkit": self.devkit}


def open_archives(
    archives: Archives, allow_partial: bool, processes: int, progress: Progress, say: Callable[[str], None]
) -> tuple[ShardSource, ShardSource]:
    """The images of train and val.

    Args:
        allow_partial: tell, and do not refuse, other checksums and counts than those of the originals.

    Raises:
        UserError: naming the archive and the entry, if one is not as it should be.
    """
    for path in archives.by_name.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    refuse = say if allow_partial else refuse_partial
    for name, path in archives.by_name.items():
        expected = ARCHIVE_META[name][1]
        try:
            actual = md5_of(path, progress)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if actual != expected:
            refuse(f"{path} is not ImageNet's {ARCHIVE_META[name][0]}: its md5 is {actual}, not {expected}")
    wnids_by_id, truth = read_devkit(archives.devkit)
    class_names, train = index_train(archives.train, processes, progress)
    val = index_val(archives.val, class_names, [wnids_by_id.get(number, "") for number in truth])
    sources = tuple(
        ShardSource(name=str(archives.by_name[split]), split=split, class_names=class_names, index=index)
        for split, index in (("train", train), ("val", val))
    )
    check_counts(sources, refuse)
    return sources


def check_counts(sources: tuple[Source, Source], refuse: Callable[[str], None]) -> None:
    """Call `refuse` with what is not as in ImageNet-1k."""
    for source, expected in zip(sources, (imagenet.NUM_TRAIN_IMAGES, imagenet.NUM_VAL_IMAGES), strict=True):
        if len(source) != expected:
            refuse(f"{len(source):,} {source.split} images in {source.name}, where ImageNet has {expected:,}")
    train, _ = sources
    if not imagenet.is_imagenet_1k(train.class_names):
        refuse(f"{len(train.class_names):,} classes in {train.name}, which are not ImageNet-1k's 1,000")


def refuse_partial(problem: str) -> None:
    raise UserError(f"{problem}; download it again, or give --allow-partial if that is meant")


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file of their own."""

    def __init__(self, path: Path, offset: int, size: int):
        self._descriptor = os.open(path, os.O_RDONLY)
        self._offset, self._size, self._place = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._place)]
        count = os.preadv(self._descriptor, [view], self._offset + self._place) if len(view) else 0
        self._place += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _entries(archive: tarfile.TarFile, where: str) -> Iterator[tarfile.TarInfo]:
    """Those that are files of this archive's own, in its top folder.

    Raises:
        UserError: naming the first that is not, or where it is cut off.
    """
    seen: set[str] = set()
    try:
        for member in whole(archive):
            name = member.name.removeprefix("./")
            if member.isdir() and name in ("", "."):
                continue
            if not member.isreg() or member.issparse():
                raise UserError(f"{where}: entry {member.name!r} is no plain file; this is not ImageNet's archive")
            if name in seen:
                raise UserError(f"{where}: two entries named {member.name!r}; this is not ImageNet's archive")
            seen.add(name)
            yield member
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{where} is cut off or no tar file ({error}); download it again") from None


def _check_image(member: tarfile.TarInfo, where: str, pattern: re.Pattern[str]) -> re.Match[str]:
    """Raises UserError for a name with folders in it, or of something else, and for an impossible size."""
    match = pattern.fullmatch(member.name.removeprefix("./"))
    if match is None:
        raise UserError(f"{where}: entry {member.name!r} has no name of an image there")
    if not 0 < member.size <= MAX_IMAGE_BYTES:
        raise UserError(f"{where}: entry {member.name!r} has {file_size(member.size)}, which no image has")
    return match


def index_train(path: Path, processes: int, progress: Progress) -> tuple[tuple[str, ...], ShardIndex]:
    """The WordNet ids, sorted, and where all images of the archives in this archive lie."""
    inner = []
    for member in _open(path):
        match = _CLASS_ARCHIVE.fullmatch(member.name.removeprefix("./"))
        if match is None:
            raise UserError(f"{path}: entry {member.name!r} is not named as a class's archive, such as n01440764.tar")
        inner.append((match[1], member.offset_data, member.size))
    if not inner:
        raise UserError(f"{path}: nothing in it")
    inner.sort()
    progress.start(len(inner), f"entries of {path.name}", "classes")
    found: dict[str, tuple[list[bytes], np.ndarray]] = {}
    for wnid, keys, places in run_parallel(partial(_index_class, path), inner, processes):
        found[wnid] = keys, places
        progress.add(1)
    progress.finish()
    class_names = tuple(wnid for wnid, *_ in inner)
    labels = np.repeat(np.arange(len(inner)), [len(found[wnid][0]) for wnid in class_names])
    all_keys = (key for wnid in class_names for key in found[wnid][0])
    return class_names, _index(path, all_keys, np.concatenate([found[wnid][1] for wnid in class_names]), labels)


def _open(path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as archive:
            yield from _entries(archive, str(path))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is cut off or no tar file ({error}); download it again") from None


def _index_class(path: Path, inner: tuple[str, int, int]) -> tuple[str, list[bytes], np.ndarray]:
    """The key of each image, sorted, and its offset in the outer archive and size, (n, 2) int64."""
    wnid, offset, size = inner
    where = f"{path}: {wnid}.tar"
    images = []
    try:
        with _Part(path, offset, size) as part, tarfile.open(fileobj=io.BufferedReader(part), mode="r:") as archive:
            for member in _entries(archive, where):
                _check_image(member, where, _IMAGE)
                if member.offset_data + member.size > size:
                    raise UserError(f"{where}: entry {member.name!r} is cut off; download it again")
                name = member.name.removeprefix("./")
                images.append((f"{wnid}/{name}".encode(), offset + member.offset_data, member.size))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{where} is cut off or no tar file ({error}); download it again") from None
    if not images:
        raise UserError(f"{where}: no images in it")
    images.sort()
    return wnid, [key for key, *_ in images], np.array([place for _, *place in images], dtype=np.int64)


def index_val(path: Path, class_names: tuple[str, ...], wnids: list[str]) -> ShardIndex:
    """Where the validation images lie; `wnids`: of the images 1, 2, 3 …, by the devkit."""
    labels = {wnid: label for label, wnid in enumerate(class_names)}
    rows, total = [], path.stat().st_size
    for member in _open(path):
        number = int(_check_image(member, str(path), _VAL_IMAGE)[1])
        if not 1 <= number <= len(wnids):
            raise UserError(f"{path}: entry {member.name!r}, but the devkit has labels of {len(wnids):,} images")
        wnid = wnids[number - 1]
        if wnid not in labels:
            raise UserError(
                f"{path}: entry {member.name!r} is of class {wnid or 'unknown'}, which has no training images"
            )
        if member.offset_data + member.size > total:
            raise UserError(f"{path}: entry {member.name!r} is cut off; download it again")
        key = f"{wnid}/{member.name.removeprefix('./')}".encode()
        rows.append((key, member.offset_data, member.size, labels[wnid]))
    if not rows:
        raise UserError(f"{path}: nothing in it")
    rows.sort()
    numbers = np.array([numbers for _, *numbers in rows], dtype=np.int64)
    return _index(path, (key for key, *_ in rows), numbers[:, :2], numbers[:, 2].copy())


def _index(path: Path, keys: Iterable[bytes], places: np.ndarray, labels: np.ndarray) -> ShardIndex:
    """`places`: of each image the offset and the size, (N, 2) int64."""
    status = path.stat()
    stats = np.array([[status.st_size, status.st_mtime_ns]], dtype=np.int64)
    offsets, sizes = places[:, 0].copy(), places[:, 1].copy()
    return ShardIndex((str(path),), stats, PackedBytes(keys), np.zeros_like(offsets), offsets, sizes, labels)


class _Limited(io.RawIOBase):
    """A decompressed stream that ends with an error after so many bytes."""

    def __init__(self, stream: Any, limit: int, where: str):
        self._stream, self._left, self._where = stream, limit, where

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise UserError(
                f"{self._where} unpacks to over {file_size(MAX_DEVKIT_BYTES)}; this is not ImageNet's devkit"
            )
        return data


def read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """The WordNet ids by the devkit's own class numbers, which are not in their order; the numbers of the validation
    images 1, 2, 3 ….

    Raises:
        UserError: if it is not ImageNet's development kit.
    """
    import gzip

    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream:
            limited = _Limited(stream, MAX_DEVKIT_BYTES, str(path))
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                for member in archive:
                    for name in (META_NAME, TRUTH_NAME):
                        if member.name.endswith(f"/{name}") and member.isreg() and not member.issparse():
                            file = archive.extractfile(member)
                            assert file is not None, "a regular entry"
                            found[name] = file.read()
        return _wnids_by_id(found[META_NAME]), [int(line) for line in found[TRUTH_NAME].split()]
    except KeyError as error:
        raise UserError(f"{path}: no {error} in it; this is not ImageNet's devkit of tasks 1 and 2") from None
    except (tarfile.TarError, EOFError, OSError, ValueError, TypeError, IndexError, gzip.zlib.error) as error:
        raise UserError(f"{path} is cut off or no ImageNet devkit ({error}); download it again") from None


def _wnids_by_id(meta: bytes) -> dict[int, str]:
    """Of the classes without children; the devkit also lists those above them."""
    import scipy.io

    synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), int(row["num_children"])) for row in np.atleast_1d(synsets)]
    return {number: wnid for number, wnid, num_children in rows if num_children == 0}
