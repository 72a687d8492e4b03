"""md5 sums of archives, kept between runs: reading 138 GB takes minutes, and a run may be killed and go on."""

import hashlib
from pathlib import Path

from resnet_in1k.utils import files
from resnet_in1k.utils.files import cache_file
from resnet_in1k.utils.pool import Progress

BLOCK_BYTES = 16 << 20


def md5_of(path: Path, progress: Progress) -> str:
    """What is kept counts while the file's size, times and inode are the same. Raises OSError if it cannot be read."""
    file = cache_file("md5", [path], ".json")
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    kept = files.read_json_object(file) or {}
    if kept.get("stamp") == stamp and "md5" in kept:
        return str(kept["md5"])
    md5 = _compute(path, progress)

    def keep() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, {"stamp": stamp, "md5": md5})

    files.failure_of(keep)  # without it the next run computes it again
    return md5


def _compute(path: Path, progress: Progress) -> str:
    digest, done = hashlib.md5(usedforsecurity=False), 0
    progress.start(path.stat().st_size >> 20, f"md5 of {path.name}", "MB")
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            progress.add(((done + len(block)) >> 20) - (done >> 20))
            done += len(block)
    progress.finish()
    return digest.hexdigest()
