"""The one way this project writes a file: under a temporary name, synced, then renamed.

Whoever reads a path therefore finds the old content or the new, never half of either, even after a power cut.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from resnet_in1k.errors import UserError

T = TypeVar("T")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then put the result in place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """UTF-8; a byte of a file name that is not, as old archives have them, as \\udcXX, which JSON reads back."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", errors="backslashreplace")))


def read_text(path: Path) -> str:
    return twice_if_need_be(lambda: path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Refuses NaN and infinity (ValueError): they are not JSON, and other readers would choke on them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder in the body; it takes the name `path` only if the body succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()  # in a folder that must be there: one that has vanished is an error, not to be made anew
    try:
        yield temporary
        for path_below in temporary.rglob("*"):
            _sync(path_below)
        _sync(temporary)
        if path.exists():  # the same step, saved again: a folder cannot take another's place in one call
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
            try:
                os.rename(temporary, path)
            except BaseException:
                os.rename(old, path)
                raise
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name(error, path)
        raise
    _sync(path.parent)


def delete_folder(path: Path) -> None:
    """At once for all who look for `path`; what cannot be deleted now is cleared away by the next run."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Add a line, whole and synced; if it cannot be, what was there before is all that is there."""
    with path.open("ab") as file:
        size = file.tell()
        try:
            file.write(line.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            _name(error, path)
            raise


def set_aside(folder: Path) -> list[tuple[Path, Path]]:
    """Folders that `new_folder` was about to replace when its process was killed, with the names they had."""
    return [(old, old.with_name(old.name[1 : -len(".old")])) for old in folder.glob(".*.old")]


def remove_temporaries(folder: Path) -> None:
    """Delete what writers have left behind that were killed. None may be at work."""
    for left in [*folder.glob(".*.tmp"), *folder.glob(f"{TEMPORARY_FOLDER}*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


TEMPORARY_FOLDER = ".temporary."
"""What a folder's name begins with that is of use to its process only."""

TRANSIENT_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
"""What a network file system may answer now and not in a moment."""
RETRY_AFTER_SECONDS = 1.0


def twice_if_need_be(call: Callable[[], T]) -> T:
    """What `call` returns, at the second try if the first meets what may pass in a moment."""
    try:
        return call()
    except OSError as error:
        if error.errno not in TRANSIENT_ERRORS:
            raise
        time.sleep(RETRY_AFTER_SECONDS)
        return call()


def why_not(write: Callable[[], None]) -> str | None:
    """Call `write`, twice if need be; None if it succeeded, else in words why it could not."""
    try:
        twice_if_need_be(write)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be written: {error.strerror or error}"
    return None


def sha256_of(path: Path) -> str:
    def read_all() -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    return twice_if_need_be(read_all)


def link_or_copy(source: Path, target: Path) -> None:
    """The same content under another name: for nothing, where the file system has hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def git_blob_sha1_of(path: Path) -> str:
    """The id that git gives to a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _name(error: BaseException, path: Path) -> None:
    """A failed write, unlike a failed open, does not say by itself which file it was about."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
