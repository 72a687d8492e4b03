"""Any source of images to a folder by class, each class whole or not there at all."""

import contextlib
import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from resnet_in1k.data.dataset import IMAGE_SUFFIXES, FileSource, Source
from resnet_in1k.data.image_folder import PARTIAL
from resnet_in1k.prepare.shard_writer import suffix_of
from resnet_in1k.prepare.written import Change, check_is_ours, content_sha256, written_bytes
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import file_size
from resnet_in1k.utils.pool import Progress, run_parallel

DONE = ".done."
"""In such a class, before the number of a part whose images are all written. It holds `boot_id`: they may not be on the
disk yet, and a power cut would lose them."""
SYNCED_EVERY_SECONDS = 30.0
"""Whole classes get their names then, once for many: each sync waits for all that the machine has still to write."""
PLAN_NAME = ".plan.json"
IMAGES_PER_PART = 256


class Part(NamedTuple):
    """Some images of one class, which one process writes: a folder of few classes keeps all processes busy, too."""

    label: int
    number: int
    """Of the class's parts, from 0 on."""
    size: int

    def members(self, labels: np.ndarray) -> list[int]:
        """Their positions in the source."""
        return np.flatnonzero(labels == self.label)[self.number * IMAGES_PER_PART :][: self.size].tolist()


def write_folder(
    source: Source, folder: Path, processes: int, progress: Progress, change: Change | None = None, resized_to: int = 0
) -> int:
    """Write `folder/<class>/<name>`. A class that is there is not written again, nor are whole parts of one. Returns
    how many images could not be changed.

    Without a change, files are linked where they can be, and copied else: the originals stay as they are.

    Raises:
        UserError: if the folder has other images, two images have the same name, an image cannot be read, or a file
            not be written.
    """
    _check_names(source)
    _or_refuse(lambda: _begin(source, folder, resized_to))
    missing = _missing_parts(source, folder)
    num_left = {label: len(parts) for label, parts in missing.items()}
    whole = [label for label, number in num_left.items() if not number]  # a run was killed before it named them
    for label in missing:
        _or_refuse(lambda label=label: _partial(folder, source, label).mkdir(exist_ok=True))
    parts = list(itertools.chain(*missing.values()))
    progress.start(sum(part.size for part in parts), f"{folder.name} images")
    num_undecodable, synced_at = 0, time.monotonic()
    for part, undecodable in run_parallel(functools.partial(_write_part, source, folder, change), parts, processes):
        progress.add(part.size)
        num_undecodable += len(undecodable)
        for line in undecodable:
            progress.print(line)
        num_left[part.label] -= 1
        if not num_left[part.label]:
            whole.append(part.label)
        if time.monotonic() - synced_at >= SYNCED_EVERY_SECONDS:
            _finish_classes(source, folder, whole)
            whole, synced_at = [], time.monotonic()
    _finish_classes(source, folder, whole)
    progress.finish()
    return num_undecodable


def _partial(folder: Path, source: Source, label: int) -> Path:
    return folder / f"{PARTIAL}{source.class_names[label]}"


def _or_refuse(write: Callable[[], None]) -> None:
    """Raises UserError if it fails to write."""
    if problem := files.failure_of(write):
        raise UserError(problem)


def _check_names(source: Source) -> None:
    """Before anything is written: a second image would replace the first."""
    if len(set(source.class_names)) < len(source.class_names):
        twice = next(name for place, name in enumerate(source.class_names) if name in source.class_names[:place])
        raise UserError(f"{source.name}: two classes are named {twice!r}; write --shards, where names may repeat")
    by_class = np.split(np.argsort(source.labels, kind="stable"), np.cumsum(np.bincount(source.labels))[:-1])
    for class_name, members in zip(source.class_names, by_class, strict=False):
        if not class_name or "/" in class_name or class_name.startswith("."):
            raise UserError(f"{source.name}: class {class_name!r} cannot be a folder's name; write --shards")
        seen: dict[str, int] = {}
        for index in members.tolist():
            other = seen.setdefault(_name(source, index, class_name), index)
            if other != index:
                raise UserError(
                    f"{source.image_name(index)} and {source.image_name(other)} would be the same file in class "
                    f"{class_name}; write --shards, where names may repeat"
                )


def _begin(source: Source, folder: Path, resized_to: int) -> None:
    plan = {"source_sha256": content_sha256(source), "resized_to": resized_to}
    check_is_ours(folder, PLAN_NAME, plan, "is of other images or of another size")
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_temporaries(folder, below=False)
    files.write_json(folder / PLAN_NAME, plan)


def _missing_parts(source: Source, folder: Path) -> dict[int, list[Part]]:
    """By label, of the classes that are not whole; none of a class that has only to be renamed."""
    missing = {}
    for label, num_images in enumerate(np.bincount(source.labels).tolist()):
        name = source.class_names[label]
        if not num_images or (folder / name).exists():
            continue
        markers = _partial(folder, source, label).glob(f"{DONE}*")
        done = {marker.name for marker in markers if marker.read_bytes() == boot_id() != b""}
        parts = [
            Part(label, number, min(IMAGES_PER_PART, num_images - start))
            for number, start in enumerate(range(0, num_images, IMAGES_PER_PART))
        ]
        missing[label] = [part for part in parts if f"{DONE}{part.number}" not in done]
    return missing


def _write_part(source: Source, folder: Path, change: Change | None, part: Part) -> tuple[Part, list[str]]:
    """With a line for each image that could not be changed."""
    class_name, partial = source.class_names[part.label], _partial(folder, source, part.label)
    undecodable: list[str] = []

    def write() -> None:
        undecodable.clear()  # this may be a retry
        for index in part.members(source.labels):
            name = file_name(source, index, class_name)
            for parent in reversed(name.parents[:-1]):  # `partial` is gone once the class is whole, and stays so
                (partial / parent).mkdir(exist_ok=True)
            _write_image(source, index, partial / name, change, undecodable)
        (partial / f"{DONE}{part.number}").write_bytes(boot_id())

    _or_refuse(write)
    return part, undecodable


def _write_image(source: Source, index: int, target: Path, change: Change | None, undecodable: list[str]) -> None:
    if change is None and isinstance(source, FileSource) and _is_link(source, index, target):
        return
    # Under another name first: a process of a killed run may be writing the same image for a moment yet.
    temporary = target.with_name(f".{index}.{os.getpid()}.tmp")
    temporary.write_bytes(written_bytes(source, index, change, undecodable))
    os.replace(temporary, target)


def _is_link(source: FileSource, index: int, target: Path) -> bool:
    """Make it one to the original, if it is none yet; False where there can be none, as on another file system."""
    original = Path(source.image_name(index)).resolve()
    try:
        os.link(original, target)
    except FileExistsError:
        return target.samefile(original)
    except OSError:
        return False
    return True


def _finish_classes(source: Source, folder: Path, labels: list[int]) -> None:
    """Give them their names, once their images are on the disk."""

    def finish(label: int) -> None:
        partial = _partial(folder, source, label)
        files.remove_temporaries(partial)
        for done in partial.glob(f"{DONE}*"):
            done.unlink()
        os.rename(partial, folder / source.class_names[label])

    if labels:
        os.sync()
    for label in labels:
        _or_refuse(functools.partial(finish, label))


@functools.cache
def boot_id() -> bytes:
    """Of this machine's operating system since it was started; nothing where it does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return b""


def file_name(source: Source, index: int, class_name: str) -> PurePosixPath:
    """Below the class's folder: as the image is named in the source, else by its number."""
    path = PurePosixPath(_name(source, index, class_name))
    if isinstance(source, FileSource) or path.suffix.lower() in IMAGE_SUFFIXES:
        return path
    return path.parent / (
        path.name + suffix_of(source.read(index)[:16].tobytes(), source.image_name(index).rstrip(")"))
    )


def _name(source: Source, index: int, class_name: str) -> str:
    """Without a suffix where the source's keys have none. No PurePosixPath: it is asked for a million times."""
    key = os.fsdecode(source.key(index)) if hasattr(source, "key") else ""
    parts = [part for part in key.split("/") if part not in ("", ".")]
    if class_name in parts[:-1] and not any(part.startswith(".") for part in parts):
        return "/".join(parts[parts.index(class_name) + 1 :])
    return parts[-1] if isinstance(source, FileSource) else f"{index:08d}"


def can_link(source: Source, folder: Path) -> bool:
    """Whether the images are files that can be linked there, and so need no space; found by trying."""
    trial = _nearest(folder) / f".link.{os.getpid()}.tmp"
    try:
        return isinstance(source, FileSource) and _is_link(source, 0, trial)
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()


def check_space(folder: Path, needed_bytes: int, num_files: int = 0) -> None:
    """Raises UserError if the file system has less left, or room for fewer files, where their number is limited."""
    place = _nearest(folder)
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(f"{place} has {file_size(free)} left, and {file_size(needed_bytes)} are needed")
    status = os.statvfs(place)
    if status.f_files and status.f_favail < num_files:
        raise UserError(
            f"{place} has room for {status.f_favail:,} more files (df -i), but {num_files:,} are needed; try --shards"
        )


def _nearest(folder: Path) -> Path:
    """Itself or, where it is not there yet, the folder that it will be in."""
    return next(each for each in [folder, *folder.absolute().parents] if each.is_dir())
