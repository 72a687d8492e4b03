"""Any source of images to tar shards of WebDataset's convention, which `--data shards:DIR` and other loaders read."""

import functools
import io
import re
import tarfile
from dataclasses import asdict
from pathlib import Path

from resnet_in1k.data.dataset import IMAGE_SUFFIXES, Source
from resnet_in1k.data.tar_plan import PLAN_NAME, ShardPlan
from resnet_in1k.data.tar_shards import CLASSES_NAME
from resnet_in1k.prepare.written import (
    Change,
    Written,
    check_is_ours,
    content_sha256,
    mean_written_bytes,
    written_bytes,
)
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.pool import Progress, run_parallel

MEASURED_IMAGES = 1000
"""Of which the mean size is taken, to tell how many images make a shard."""
BLOCK_BYTES = 512
_NO_KEY = re.compile(r"[^\w-]+")


def write_shards(
    source: Source,
    folder: Path,
    shard_bytes: int,
    processes: int,
    progress: Progress,
    change: Change | None = None,
    resized_to: int = 0,
) -> int:
    """Write `folder/shard-000000.tar` and so on, and the class names above it. Shards that are there are not written
    again, and the same source gives the same bytes. Returns how many images could not be changed.

    Args:
        shard_bytes: about how large a shard is.
        change: of each image's bytes, such as resizing; `resized_to` says which, for the plan.

    Raises:
        UserError: if the folder has shards of something else, or an image cannot be read or a shard not be written.
    """
    plan = ShardPlan(content_sha256(source), len(source), _images_per_shard(source, shard_bytes, change), resized_to)
    check_is_ours(folder, PLAN_NAME, asdict(plan), "has shards of other images or of another size")
    _check_class_names(source, folder)
    if problem := files.failure_of(lambda: _begin(source, folder, plan)):
        raise UserError(problem)
    present = {path.name for path in folder.iterdir()}
    missing = [number for number, name in enumerate(plan.names) if name not in present]
    progress.start(len(missing) * plan.images_per_shard, f"{folder.name} shards")
    num_undecodable = 0
    for written in run_parallel(functools.partial(_write_shard, source, folder, plan, change), missing, processes):
        progress.add(written.num_images)
        num_undecodable += len(written.undecodable)
        for line in written.undecodable:
            progress.print(line)
    progress.finish()
    return num_undecodable


def _check_class_names(source: Source, folder: Path) -> None:
    """Raises UserError if those above a folder that is still to be made are of something else."""
    path = folder.parent / CLASSES_NAME
    if folder.is_dir() or not path.exists():
        return
    try:
        is_ours = files.read_json(path) == list(source.class_names)
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{path} is of other images; choose another folder, or remove it")


def _begin(source: Source, folder: Path, plan: ShardPlan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_temporaries(folder, below=False)
    files.write_json(folder.parent / CLASSES_NAME, list(source.class_names))
    files.write_json(folder / PLAN_NAME, asdict(plan))


def _images_per_shard(source: Source, shard_bytes: int, change: Change | None) -> int:
    # Each of the two entries has a header and is filled up to whole blocks.
    mean = mean_written_bytes(source, change, MEASURED_IMAGES) + 3.5 * BLOCK_BYTES
    return max(1, round(shard_bytes / mean))


def _write_shard(source: Source, folder: Path, plan: ShardPlan, change: Change | None, number: int) -> Written:
    members, undecodable = plan.members(number).tolist(), []

    def write(path: Path) -> None:
        undecodable.clear()  # this may be a retry
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for index in members:
                image, name = written_bytes(source, index, change, undecodable), source.image_name(index)
                key = key_of(index, name)
                _add(archive, key + suffix_of(image, name), image)
                _add(archive, f"{key}.cls", str(int(source.labels[index])).encode())

    if problem := files.failure_of(lambda: files.write_atomically(folder / plan.names[number], write)):
        raise UserError(problem)
    return Written(len(members), undecodable)


def key_of(index: int, name: str) -> str:
    """Sorted, the keys are in the order of the source; what follows the number is for people, its last two names."""
    words = [_NO_KEY.sub("-", part) for part in Path(name).with_suffix("").parts[-2:]]
    key = f"{index:08d}_{'_'.join(words)}".encode()[:90]  # a USTAR name has 100 bytes
    return key.decode(errors="ignore")


def suffix_of(image: bytes, name: str) -> str:
    """By the content, as ImageNet's files named .JPEG are not all JPEGs; else as it was named."""
    for magic, suffix in ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp")):
        if image.startswith(magic):
            return suffix
    suffix = Path(name).suffix.lower()
    return suffix if suffix in IMAGE_SUFFIXES else ".jpg"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # of no user, at no time: the same images give the same bytes
    entry.size, entry.mode = len(data), 0o644
    archive.addfile(entry, io.BytesIO(data))
