"""Write any source of images as a folder of classes or as tar shards, unchanged or resized.

A class, or a shard, gets its name once it is complete and on the disk. A killed run can be repeated: it writes what is
missing. Both formats keep a plan in their folder, so that a folder never has images of two sources or sizes.
"""

import functools
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from resnet_in1k.data.dataset import IMAGE_SUFFIXES, DivisibleSource, FileSource, Source, spread_over
from resnet_in1k.data.decode import decode
from resnet_in1k.data.image_folder import PARTIAL
from resnet_in1k.data.tar_shards import CLASSES_NAME, PLAN_NAME, planned_shards, read_class_names
from resnet_in1k.utils import files
from resnet_in1k.utils.console import progress_bar
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import file_size
from resnet_in1k.utils.pool import run_parallel

JPEG_QUALITY, JPEG_SUBSAMPLING = 90, "4:2:0"
"""Like most of ImageNet's own files; FFCV's published recipes are trained on copies of this quality."""
IMAGES_PER_JOB = 256
"""A large class is divided among the processes."""
SYNC_EVERY_SECONDS = 30.0
"""Complete classes get their names at this interval: each sync waits for all that the machine has to write."""
FOLDER_PLAN_NAME = ".plan.json"
SAMPLED_IMAGES = 100
"""Images with the same content if an interrupted run is to be continued."""
MEASURED_IMAGES = 1000
"""Images that give the mean size, and so the number of images in a shard."""


def resize(encoded: bytes, shorter_side: int) -> bytes:
    """Return a JPEG with this shorter side in pixels, upright by its EXIF orientation; a smaller image is unchanged.

    Raises:
        ValueError: if the image cannot be decoded.
    """
    image = decode(np.frombuffer(bytearray(encoded), dtype=np.uint8))  # (3, H, W) uint8
    if min(image.shape[1:]) <= shorter_side:
        return encoded
    resized = F.resize(image, [shorter_side], InterpolationMode.BICUBIC, antialias=True)
    file = io.BytesIO()
    picture = Image.fromarray(resized.permute(1, 2, 0).numpy())
    picture.save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=JPEG_SUBSAMPLING, optimize=True)
    return file.getvalue()


def written_bytes(source: Source, index: int, resize_to: int, undecodable: list[str]) -> bytes:
    """Return the bytes to write; `resize_to` is the shorter side in pixels, 0 for unchanged.

    An image that cannot be decoded is unchanged, and reported in `undecodable`: stopping would cost the hours before.

    Raises:
        UserError: if the image cannot be read.
    """
    name = source.image_name(index)
    try:
        data = files.retry_once(functools.partial(source.read, index)).tobytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    try:
        return resize(data, resize_to) if resize_to else data
    except ValueError as error:
        undecodable.append(f"{name} cannot be decoded ({error}), and is copied unchanged")
        return data


def mean_written_bytes(source: Source, resize_to: int, num_images: int) -> float:
    """Estimate the mean size of a written image from images spread over the source."""
    sizes = [len(written_bytes(source, index, resize_to, [])) for index in spread_over(source, num_images)]
    return float(np.mean(sizes))


def content_sha256(source: Source) -> str:
    """Return a sha256 of the fingerprint and of some images' content: resized copies have the same names."""
    digest = hashlib.sha256(source.fingerprint().encode())
    for index in spread_over(source, SAMPLED_IMAGES):
        digest.update(hashlib.sha256(written_bytes(source, index, 0, [])).digest())
    return digest.hexdigest()


def write_folder(source: Source, folder: Path, processes: int, resize_to: int = 0) -> int:
    """Write `folder/<class>/<name>`, except classes that are there already.

    Unchanged files are hard links if possible, else copies.

    Returns:
        The number of images that could not be resized.

    Raises:
        UserError: if the folder has other images, two images have the same name, an image cannot be read or a file
            cannot be written.
    """
    by_class = np.split(np.argsort(source.labels, kind="stable"), np.cumsum(np.bincount(source.labels))[:-1])
    _check_names(source, by_class)
    _begin(folder, FOLDER_PLAN_NAME, {"source_sha256": content_sha256(source), "resized_to": resize_to})
    names = source.class_names
    missing = [label for label, members in enumerate(by_class) if len(members) and not (folder / names[label]).exists()]
    with files.user_errors():
        for interrupted in folder.glob(f"{PARTIAL}*"):
            files.delete_folder(interrupted)
        for label in missing:  # all now: training refuses a folder with a partial class
            (folder / f"{PARTIAL}{names[label]}").mkdir()
    starts = [(label, start) for label in missing for start in range(0, len(by_class[label]), IMAGES_PER_JOB)]
    jobs = [(label, by_class[label][start : start + IMAGES_PER_JOB]) for label, start in starts]
    num_undecodable, complete, synced_at = 0, list[Path](), time.monotonic()
    write = functools.partial(_write_to_class, source, folder, resize_to)
    with progress_bar(sum(len(members) for _, members in jobs), folder.name) as bar:
        for (label, members), undecodable in zip(jobs, run_parallel(write, jobs, processes), strict=True):
            num_undecodable += _report(bar, len(members), undecodable)
            if members[-1] == by_class[label][-1]:
                complete.append(folder / names[label])
            if time.monotonic() - synced_at >= SYNC_EVERY_SECONDS:
                _name_classes(complete)
                complete, synced_at = [], time.monotonic()
        _name_classes(complete)
    return num_undecodable


def _write_to_class(source: Source, folder: Path, resize_to: int, job: tuple[int, np.ndarray]) -> list[str]:
    """Return a line for each image that could not be resized."""
    label, members = job
    undecodable: list[str] = []
    class_name = source.class_names[label]
    partial = folder / f"{PARTIAL}{class_name}"
    for index in members.tolist():
        name = _name(source, index, class_name)
        with files.user_errors():
            for parent in reversed(Path(name).parents[:-1]):
                (partial / parent).mkdir(exist_ok=True)
        if not resize_to and isinstance(source, FileSource) and _link(source, index, partial / name):
            continue
        data = written_bytes(source, index, resize_to, undecodable)
        if not isinstance(source, FileSource) and not name.lower().endswith(IMAGE_SUFFIXES):
            name += suffix_of(data, source.image_name(index))
        with files.user_errors():
            files.retry_once(functools.partial(_write_image, partial / name, data))
    return undecodable


def _write_image(target: Path, data: bytes) -> None:
    # By a temporary name: a process of a killed run may be writing the same image for a moment.
    temporary = target.with_name(f".{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, target)


def _name_classes(classes: list[Path]) -> None:
    if classes:
        os.sync()  # a power cut must not leave a class with its name and without its images
    with files.user_errors():
        for path in classes:
            partial = path.with_name(f"{PARTIAL}{path.name}")
            files.remove_temporaries(partial)
            os.rename(partial, path)


def _link(source: FileSource, index: int, target: Path) -> bool:
    """Make a hard link to the original; False if that is impossible, as on another file system."""
    original = Path(source.image_name(index)).resolve()
    try:
        os.link(original, target)
    except OSError:
        return target.exists() and target.samefile(original)  # by a process of a killed run
    return True


def _check_names(source: Source, by_class: list[np.ndarray]) -> None:
    """Raise UserError if two images would be one file, or a class has a name that a folder cannot have."""
    for label, (class_name, members) in enumerate(zip(source.class_names, by_class, strict=False)):
        if class_name in source.class_names[:label]:
            raise UserError(f"{source.name}: two classes are named {class_name!r}; --shards can have both")
        if not class_name or "/" in class_name or class_name.startswith("."):
            raise UserError(f"{source.name}: class {class_name!r} cannot be a folder's name; write --shards")
        for name, number in Counter(_name(source, index, class_name) for index in members.tolist()).most_common(1):
            if number > 1:
                raise UserError(f"{source.name}: {number} images would be {class_name}/{name}; --shards can have all")


def _name(source: Source, index: int, class_name: str) -> str:
    """Return the path below the class's folder: as in the source, else the image's number without a suffix."""
    key = os.fsdecode(source.keys[index]) if isinstance(source, DivisibleSource) else ""
    parts = [part for part in key.split("/") if part not in ("", ".")]
    if class_name in parts[:-1] and not any(part.startswith(".") for part in parts):
        return "/".join(parts[parts.index(class_name) + 1 :])
    return parts[-1] if isinstance(source, FileSource) else f"{index:08d}"


def suffix_of(image: bytes, name: str) -> str:
    """Return the suffix by content, as some of ImageNet's .JPEG files are not JPEGs; else by name."""
    for magic, suffix in ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp")):
        if image.startswith(magic):
            return suffix
    suffix = Path(name.rstrip(")")).suffix.lower()  # a table's image is named TABLE[ROW] (PATH)
    return suffix if suffix in IMAGE_SUFFIXES else ".jpg"


def write_shards(source: Source, folder: Path, shard_bytes: int, processes: int, resize_to: int = 0) -> int:
    """Write `folder/shard-000000.tar` …, except shards that are there already, and the class names above the folder.

    The same source gives the same bytes.

    Returns:
        The number of images that could not be resized.

    Raises:
        UserError: if the folder has shards of other images, an image cannot be read or a shard cannot be written.
    """
    # A sample's two entries have a header each, and are filled up to blocks of 512 bytes.
    mean_bytes = mean_written_bytes(source, resize_to, MEASURED_IMAGES) + 3.5 * 512
    plan = {
        "source_sha256": content_sha256(source),
        "num_images": len(source),
        "images_per_shard": max(1, round(shard_bytes / mean_bytes)),
        "resized_to": resize_to,
    }
    classes = folder.parent / CLASSES_NAME
    if not folder.is_dir() and read_class_names(classes) not in (None, list(source.class_names)):
        raise UserError(f"{classes} is of other images; choose another folder, or remove it")
    _begin(folder, PLAN_NAME, plan)
    with files.user_errors():
        files.write_json(classes, list(source.class_names))
        present = {path.name for path in folder.iterdir()}
    missing = [number for number, name in enumerate(planned_shards(plan)) if name not in present]
    num_undecodable = 0
    write = functools.partial(_write_shard, source, folder, plan)
    with progress_bar(len(missing), folder.name, "shards") as bar:
        for undecodable in run_parallel(write, missing, processes):
            num_undecodable += _report(bar, 1, undecodable)
    return num_undecodable


def _write_shard(source: Source, folder: Path, plan: dict[str, Any], shard: int) -> list[str]:
    # Shuffled, always alike: some loaders read one shard after the other.
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(source))
    members = order[shard * plan["images_per_shard"] :][: plan["images_per_shard"]].tolist()
    undecodable: list[str] = []

    def write(path: Path) -> None:
        undecodable.clear()  # this may be a retry
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for index in members:
                image, name = written_bytes(source, index, plan["resized_to"], undecodable), source.image_name(index)
                key = key_of(index, name)
                _add(archive, key + suffix_of(image, name), image)
                _add(archive, f"{key}.cls", str(int(source.labels[index])).encode())

    with files.user_errors():
        files.write_atomically(folder / planned_shards(plan)[shard], write)
    return undecodable


def key_of(index: int, name: str) -> str:
    """Return a key that sorts in the order of the source; the last two names of the path are for people."""
    words = [re.sub(r"[^\w-]+", "-", part) for part in Path(name).with_suffix("").parts[-2:]]
    key = f"{index:08d}_{'_'.join(words)}".encode()[:90]  # a USTAR name has 100 bytes
    return key.decode(errors="ignore")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without user and time: the same images give the same bytes
    entry.size, entry.mode = len(data), 0o644
    archive.addfile(entry, io.BytesIO(data))


def _report(bar: Any, done: int, undecodable: list[str]) -> int:
    bar.update(done)
    for line in undecodable:
        bar.write(line, file=sys.stderr)
    return len(undecodable)


def _begin(folder: Path, plan_name: str, plan: dict[str, Any]) -> None:
    """Write the plan; raises UserError if the folder has anything that another plan or program has written."""
    written = files.read_json_object(folder / plan_name)
    if written is not None and written != plan:
        raise UserError(f"{folder} is of other images or of another size; choose another folder, or remove it")
    # Hidden files are what a run leaves that was killed while it wrote its plan.
    if written is None and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty, and was not written by this command; choose another folder")
    with files.user_errors():
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_temporaries(folder, files.TEMPORARY)
        files.write_json(folder / plan_name, plan)


def check_space(folder: Path, num_bytes: int, num_files: int = 0) -> None:
    """Raise UserError if the file system has no room for that many bytes or files."""
    place = files.nearest_existing(folder)
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise UserError(f"{place} has {file_size(free)} free, but {file_size(num_bytes)} are needed")
    status = os.statvfs(place)
    if status.f_files and status.f_favail < num_files:
        raise UserError(
            f"{place} has room for {status.f_favail:,} more files (df -i), but {num_files:,} are needed; try --shards"
        )


def can_link(source: Source, folder: Path) -> bool:
    """Return True for files on the folder's file system: they need no space there."""
    target = files.nearest_existing(folder)
    return isinstance(source, FileSource) and Path(source.image_name(0)).stat().st_dev == target.stat().st_dev
