"""The one way this project writes a file: under a temporary name, synced, then renamed.

A reader of a file therefore finds the old content or the new, never a part of either, even after a power cut; a reader
of a folder finds a whole one or none.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from resnet_in1k.utils.errors import UserError

T = TypeVar("T")

LOCK_NAME = ".lock"
"""In a folder that one process writes to: see core/lock.py."""
TEMPORARY_FOLDER = ".temporary."
"""Prefix of a folder that is of use to its process only."""

TRANSIENT_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
"""What a network file system may answer once and not a moment later."""
RETRY_AFTER_SECONDS = 1.0


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path next to `path`, then rename the result to `path`.

    A transient error of the file system is retried once.
    """
    retry_once(lambda: _write_atomically(path, write))


def _write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (str(temporary), temporary):
            error.filename = str(path)  # what its reader knows
        _add_filename(error, path)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """UTF-8; a byte of a file name that is no UTF-8 is written as \\udcXX, which JSON reads back."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", errors="backslashreplace")))


def read_text(path: Path) -> str:
    return retry_once(lambda: path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Refuses NaN and infinity (ValueError): they are not JSON, and other readers would fail on them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises OSError if it cannot be read, ValueError if it is not JSON, or has NaN or infinity in it."""
    try:
        return json.loads(read_text(path), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """None if there is none, or it is not a whole JSON object."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder in the body; it is renamed to `path`, replacing one, only if the body succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()  # not its parents: a run folder that has vanished is an error
    try:
        yield temporary
        for path_below in temporary.rglob("*"):
            _sync(path_below)
        _sync(temporary)
        if path.exists():  # a damaged checkpoint, or an earlier publication: rename() replaces no folder with files
            delete_folder(path)
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _add_filename(error, path)
        raise
    _sync(path.parent)


def delete_folder(path: Path) -> None:
    """`path` is gone at once; content that cannot be deleted now is deleted when the run is resumed."""
    renamed = path.with_name(f".{path.name}.{os.getpid()}.deleted.tmp")
    os.rename(path, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Add a whole line, synced; if that fails, the file is as it was before."""
    with path.open("ab") as file:
        size = file.tell()
        try:
            file.write(line.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            _add_filename(error, path)
            raise


def remove_temporaries(folder: Path, below: bool = True) -> None:
    """Delete what writers that were killed have left, at any depth or, without `below`, in the folder itself. No writer
    may be running."""
    found = folder.rglob(".*.tmp") if below else folder.glob(".*.tmp")
    for left in [*found, *folder.glob(f"{TEMPORARY_FOLDER}*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def is_below(path: Path, folder: Path) -> bool:
    """Or the folder itself; neither need be there."""
    return path.resolve().is_relative_to(folder.resolve())


def retry_once(call: Callable[[], T]) -> T:
    """What `call` returns; called a second time if the first fails with a transient error of the file system."""
    try:
        return call()
    except OSError as error:
        if error.errno not in TRANSIENT_ERRORS:
            raise
        time.sleep(RETRY_AFTER_SECONDS)
        return call()


def failure_of(write: Callable[[], None]) -> str | None:
    """Call `write`, retried once; None if it succeeded, else why it failed."""
    try:
        retry_once(write)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be written: {error.strerror or error}"
    return None


@contextlib.contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Raise UserError for an OSError in the body, naming the file and the system's reason.

    Args:
        prefix: put before the message, such as "--output: ".
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{prefix}{error.filename or 'a file'} cannot be written: {error.strerror or error}") from None


def sha256_of(path: Path) -> str:
    def read_all() -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    return retry_once(read_all)


def _add_filename(error: BaseException, path: Path) -> None:
    """A failed write, unlike a failed open, does not name its file."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where there is no home, as for a container's user without a name, one that cannot be made: nothing is kept."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "resnet_in1k")
    except RuntimeError:
        return Path(os.devnull, "resnet_in1k")


def cache_file(kind: str, paths: Sequence[Path], suffix: str) -> Path:
    """Whether what is kept there still holds is for its reader to tell."""
    return cache_folder() / f"{kind}-{digest_of(str(path.absolute()) for path in paths)}{suffix}"


def digest_of(names: Iterable[str]) -> str:
    """16 hexadecimal digits."""
    joined = "\0".join(names).encode("utf-8", "surrogateescape")
    return hashlib.sha256(joined).hexdigest()[:16]


class NoLocksError(UserError):
    """The folder's file system has no locks."""


class FolderLock:
    """Locks a folder, until `close` or until this process ends, however it ends.

    A record lock: the kernel releases it with the process, and children, such as loader workers, do not inherit it.

    Raises:
        NoLocksError: if the file system has none.
        UserError: if another process holds it.
    """

    def __init__(self, folder: Path):
        self._file = (folder / LOCK_NAME).open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self._file.close()
                raise NoLocksError(
                    f"{folder} cannot be locked ({error.strerror}); it has to be on a file system with locks"
                ) from None
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(f"{folder} is being written to by {holder}; wait for it or stop it first") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
