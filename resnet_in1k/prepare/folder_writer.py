"""Any source of images to a folder by class, each class whole or not there at all."""

import functools
import os
import shutil
from pathlib import Path, PurePosixPath

import numpy as np

from resnet_in1k.core import files
from resnet_in1k.core.errors import UserError
from resnet_in1k.core.text import file_size
from resnet_in1k.data.source import IMAGE_SUFFIXES, FileSource, Source
from resnet_in1k.prepare.parallel import Progress, run_parallel
from resnet_in1k.prepare.shard_writer import suffix_of
from resnet_in1k.prepare.written import Change, written_bytes

PARTIAL = ".partial."
"""Before the name of a class that is being written."""
PLAN_NAME = ".plan.json"


def write_folder(
    source: Source, folder: Path, processes: int, progress: Progress, change: Change | None = None, resized_to: int = 0
) -> None:
    """Write `folder/<class>/<name>`. A class that is there is not written again.

    Without a change, files are linked where they can be, and copied else: the originals stay as they are.

    Raises:
        UserError: if the folder has other images, an image cannot be read or decoded, or a file not be written.
    """
    plan = {"source_sha256": source.fingerprint(), "resized_to": resized_to}
    kept = files.read_json_object(folder / PLAN_NAME)
    if kept is not None and kept != plan:
        raise UserError(f"{folder} is being made of other images or sizes; choose another folder, or remove it")
    # A hidden file is what a killed run leaves that was just writing its plan.
    if kept is None and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty, and was not written by this script; choose another folder")

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_temporaries(folder)
        files.write_json(folder / PLAN_NAME, plan)
        for left in folder.glob(f"{PARTIAL}*"):  # of a killed run; one that still ends finds its folder gone
            shutil.rmtree(left, ignore_errors=True)

    if problem := files.failure_of(begin):
        raise UserError(problem)
    missing = [label for label, name in enumerate(source.class_names) if not (folder / name).exists()]
    by_class = np.bincount(source.labels, minlength=len(source.class_names))
    missing = [label for label in missing if by_class[label]]
    progress.start(int(by_class[missing].sum()), f"{folder.name} images")
    for count in run_parallel(functools.partial(_write_class, source, folder, change), missing, processes):
        progress.add(count)
    progress.finish()


def _write_class(source: Source, folder: Path, change: Change | None, label: int) -> int:
    """Returns how many images it has."""
    name = source.class_names[label]
    if name in (".", "..") or "/" in name or name.startswith("."):
        raise UserError(f"{source.name}: class {name!r} cannot be a folder's name")
    partial = folder / f"{PARTIAL}{os.getpid()}.{name}"
    (members,) = np.nonzero(source.labels == label)

    def write() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for index in members.tolist():
            _write_image(source, index, name, partial, change)
        os.rename(partial, folder / name)

    if problem := files.failure_of(write):
        raise UserError(problem)
    return len(members)


def _write_image(source: Source, index: int, class_name: str, folder: Path, change: Change | None) -> None:
    target = folder / file_name(source, index, class_name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if change is None and isinstance(source, FileSource):
        original = Path(source.image_name(index)).resolve()
        try:
            os.link(original, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(original, target)
        return
    target.write_bytes(written_bytes(source, index, change))


def file_name(source: Source, index: int, class_name: str) -> PurePosixPath:
    """Below the class's folder: as the image is named in the source, else by its number."""
    path = PurePosixPath(os.fsdecode(source.key(index)) if hasattr(source, "key") else "")
    parts = path.parts
    if class_name in parts[:-1] and ".." not in parts:
        path = PurePosixPath(*parts[parts.index(class_name) + 1 :])
    elif isinstance(source, FileSource):
        path = PurePosixPath(path.name)
    else:
        path = PurePosixPath(f"{index:08d}")
    if isinstance(source, FileSource) or path.suffix.lower() in IMAGE_SUFFIXES:
        return path
    return path.parent / (
        path.name + suffix_of(source.read(index)[:16].tobytes(), source.image_name(index).rstrip(")"))
    )


def can_link(source: Source, folder: Path) -> bool:
    """Whether the images are files on the file system of `folder`, which need no space there."""
    try:
        return isinstance(source, FileSource) and os.stat(source.image_name(0)).st_dev == _nearest(folder).stat().st_dev
    except OSError:  # told when it is read
        return False


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises UserError if the file system has less left."""
    free = shutil.disk_usage(_nearest(folder)).free
    if free < needed_bytes:
        raise UserError(f"{_nearest(folder)} has {file_size(free)} left, and {file_size(needed_bytes)} are needed")


def _nearest(folder: Path) -> Path:
    """Itself or, where it is not there yet, the folder that it will be in."""
    return next(each for each in [folder, *folder.absolute().parents] if each.is_dir())
