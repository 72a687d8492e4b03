"""Write any source of images as a folder of classes or as tar shards, unchanged or resized.

A class, or a shard, gets its name once it is complete and on the disk. A killed run can be repeated: it writes what is
missing. Both formats keep a plan in their folder, so that a folder never has images of two sources or sizes.
"""

import contextlib
import functools
import io
import itertools
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torchvision.transforms.v2.functional as F
from torchvision.transforms.v2 import InterpolationMode

from resnet_in1k.data.dataset import Source, samples_sha256, spread_over
from resnet_in1k.data.decode import decode
from resnet_in1k.data.formats import image_suffixes
from resnet_in1k.data.image_folder import PARTIAL, FileSource
from resnet_in1k.data.tar_shards import CLASSES_NAME, PLAN_NAME, planned_shards, read_class_names
from resnet_in1k.prepare.imagenet import ArchiveSource
from resnet_in1k.utils import files
from resnet_in1k.utils.console import progress_bar
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import file_size
from resnet_in1k.utils.pool import run_parallel

IMAGES_PER_JOB = 256
"""A large class is divided among the processes."""
SYNC_EVERY_SECONDS = 30.0
"""Complete classes get their names at this interval: each sync waits for all that the machine has to write."""
SAMPLED_IMAGES = 100
"""Images that give the mean size. An interrupted run continues only if their content is the same."""

Job = tuple[str, np.ndarray]
"""Name of a class or shard, and indices of images that belong there."""


def written_bytes(source: Source, index: int, resize_to: int, undecodable: list[str]) -> bytes:
    """Return the image or, if it is larger, a JPEG of this shorter side in pixels, upright by its EXIF orientation.

    An image that cannot be decoded is unchanged, and reported in `undecodable`: stopping would cost the hours before.
    One that cannot be read raises UserError.
    """
    name = source.image_name(index)
    with files.content_errors(name):
        encoded = files.retry_once(functools.partial(source.read, index))
    if resize_to:
        try:
            image = decode(encoded)  # (3, H, W) uint8
        except ValueError as error:
            undecodable.append(f"{name} cannot be decoded ({error}), and is copied unchanged")
            return encoded.tobytes()
        if min(image.shape[1:]) > resize_to:
            resized, file = F.resize(image, [resize_to], InterpolationMode.BICUBIC, antialias=True), io.BytesIO()
            # Like most of ImageNet's own files; FFCV's published recipes are trained on copies of this quality.
            F.to_pil_image(resized).save(file, format="JPEG", quality=90, subsampling="4:2:0", optimize=True)
            return file.getvalue()
    return encoded.tobytes()


def mean_written_bytes(source: Source, resize_to: int) -> float:
    """Estimate the mean size of a written image from images spread over the source."""
    return np.mean([len(written_bytes(source, index, resize_to, [])) for index in spread_over(source, SAMPLED_IMAGES)])


def write_folder(source: Source, folder: Path, processes: int, resize_to: int = 0) -> None:
    """Write `folder/<class>/<name>`, except classes that are there already.

    Unchanged files are hard links if possible, else copies.

    Raises:
        UserError: if the folder has other images, an image cannot be read or a file cannot be written.
    """
    for name, number in Counter(source.class_names).items():
        if number > 1 or not name or "/" in name or name.startswith("."):
            raise UserError(f"{source.name}: class {name!r} is there twice or cannot name a folder; write --shards")
    _begin(source, folder, ".plan.json", {"resized_to": resize_to})
    order = np.argsort(source.labels, kind="stable")
    jobs = [
        (source.class_names[source.labels[part[0]]], part)
        for members in np.split(order, np.flatnonzero(np.diff(source.labels[order])) + 1)  # of one class each
        for part in np.split(members, range(IMAGES_PER_JOB, len(members), IMAGES_PER_JOB))
    ]
    _write_missing(functools.partial(_write_to_class, source, resize_to), folder, jobs, processes)


def _write_to_class(source: Source, resize_to: int, folder: Path, job: Job) -> list[str]:
    class_name, members = job
    undecodable, has_names = list[str](), isinstance(source, (FileSource, ArchiveSource))
    (folder / class_name).mkdir(exist_ok=True)
    for index in members.tolist():
        name = os.fsdecode(source.keys[index]).removeprefix(f"{class_name}/") if has_names else f"{index:08d}"
        target = folder / class_name / name
        if "/" in name:
            target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, FileSource) and not resize_to:
            with contextlib.suppress(OSError):  # such as another file system
                os.link(Path(source.image_name(index)).resolve(), target)
                continue
        data = written_bytes(source, index, resize_to, undecodable)
        if not has_names:
            target = target.with_suffix(suffix_of(data, source.image_name(index)))
        target.unlink(missing_ok=True)  # never write to the original, if it was linked in spite of an error
        target.write_bytes(data)
    return undecodable


def suffix_of(image: bytes, name: str) -> str:
    """Return the suffix by content, as some of ImageNet's .JPEG files are not JPEGs; else by name."""
    for magic, suffix in ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp")):
        if image.startswith(magic):
            return suffix
    suffix = Path(name.rstrip(")")).suffix.lower()  # a table's image is named TABLE[ROW] (PATH)
    return suffix if suffix in image_suffixes() else ".jpg"


def write_shards(source: Source, folder: Path, shard_bytes: int, processes: int, resize_to: int = 0) -> None:
    """Write `folder/shard-000000.tar` …, except shards that are there already, and the class names above the folder.

    The same source gives the same bytes.

    Raises:
        UserError: if the folder has shards of other images, an image cannot be read or a shard cannot be written.
    """
    # A sample's two entries have a header each, and are filled up to blocks of 512 bytes.
    images_per_shard = max(1, round(shard_bytes / (mean_written_bytes(source, resize_to) + 3.5 * 512)))
    plan = {"resized_to": resize_to, "num_images": len(source), "images_per_shard": images_per_shard}
    class_names, classes = list(source.class_names), folder.parent / CLASSES_NAME
    if read_class_names(classes) not in (None, class_names):
        raise UserError(f"{classes} is of other images; choose another folder, or remove it")
    _begin(source, folder, PLAN_NAME, plan)
    with files.user_errors():
        files.write_json(classes, class_names)
    # Shuffled, always alike: some loaders read one shard after the other.
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(source))
    members = np.split(order, range(images_per_shard, len(order), images_per_shard))
    jobs = list(zip(planned_shards(plan), members, strict=True))
    _write_missing(functools.partial(_write_shard, source, resize_to), folder, jobs, processes)


def _write_shard(source: Source, resize_to: int, folder: Path, job: Job) -> list[str]:
    undecodable: list[str] = []
    shard, members = job
    with tarfile.open(folder / shard, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in members.tolist():
            image, name = written_bytes(source, index, resize_to, undecodable), source.image_name(index)
            label = str(int(source.labels[index])).encode()
            for suffix, data in ((suffix_of(image, name), image), (".cls", label)):
                entry = tarfile.TarInfo(key_of(index, name) + suffix)  # without user and time: always the same bytes
                entry.size, entry.mode = len(data), 0o644
                archive.addfile(entry, io.BytesIO(data))
    return undecodable


def key_of(index: int, name: str) -> str:
    """Return a key that sorts in the order of the source; the last two names of the path are for people."""
    words = [re.sub(r"[^\w-]+", "-", part) for part in Path(name).with_suffix("").parts[-2:]]
    key = f"{index:08d}_{'_'.join(words)}".encode()[:90]  # a USTAR name has 100 bytes
    return key.decode(errors="ignore")


def _begin(source: Source, folder: Path, plan_name: str, plan: dict[str, int]) -> None:
    """Write the plan; raises UserError if the folder has anything that another plan or program has written."""
    content = {"fingerprint": source.fingerprint(), "samples_sha256": samples_sha256(source, SAMPLED_IMAGES)}
    written = files.read_json_object(folder / plan_name)
    # Hidden files are what a run leaves that was killed while it wrote its plan.
    if written != {**content, **plan} and (written or any(folder.glob("[!.]*"))):
        raise UserError(f"{folder} has other files, other images or images of another size; choose another folder")
    with files.user_errors():
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_temporaries(folder, files.TEMPORARY)
        files.write_json(folder / plan_name, {**content, **plan})


def _write_missing(write: Callable[[Path, Job], list[str]], folder: Path, jobs: list[Job], processes: int) -> None:
    """Write the classes or shards that are not in the folder yet; the jobs of one class follow one another."""
    jobs = [(name, members) for name, members in jobs if not (folder / name).exists()]
    with files.user_errors():
        for interrupted in folder.glob(f"{PARTIAL}*"):
            files.delete_folder(interrupted)
        if not jobs:
            return
        # New in each run: processes of a killed run may write for a moment. Training refuses a folder that has it.
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
    results = zip(jobs, run_parallel(functools.partial(_attempt, write, partial), jobs, processes), strict=True)
    complete, synced_at = list[str](), time.monotonic()
    with progress_bar(sum(len(members) for _, members in jobs), folder.name) as bar:
        for name, of_class in itertools.groupby(results, key=lambda result: result[0][0]):
            for (_, members), undecodable in of_class:
                bar.update(len(members))
                for line in undecodable:
                    bar.write(line, file=sys.stderr)
            complete.append(name)
            if time.monotonic() - synced_at >= SYNC_EVERY_SECONDS or name == jobs[-1][0]:
                _move(complete, partial, folder)
                complete, synced_at = [], time.monotonic()
    partial.rmdir()


def _attempt(write: Callable[[Path, Job], list[str]], folder: Path, job: Job) -> list[str]:
    with files.user_errors(f"{folder.parent}: "):
        return files.retry_once(functools.partial(write, folder, job))


def _move(names: list[str], partial: Path, folder: Path) -> None:
    os.sync()  # a power cut must not leave a class with its name and without its images
    with files.user_errors():
        for name in names:
            os.rename(partial / name, folder / name)


def check_space(folder: Path, num_bytes: int, num_files: int) -> None:
    """Raise UserError if the file system has no room for that many bytes or files."""
    place = files.nearest_existing(folder)
    free, status = shutil.disk_usage(place).free, os.statvfs(place)
    if free < num_bytes:
        raise UserError(f"{place} has {file_size(free)} free, but {file_size(num_bytes)} are needed")
    if status.f_files and status.f_favail < num_files:
        raise UserError(
            f"{place} has room for {status.f_favail:,} more files (df -i), but {num_files:,} are needed; try --shards"
        )
