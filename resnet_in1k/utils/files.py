"""The only way this project writes a file: under a temporary name, synced, then renamed.

A reader of a file therefore finds the old content or the new, never a part, even after a power cut. A reader of a
folder finds a complete one or none.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from resnet_in1k.utils.errors import UserError

T = TypeVar("T")

LOCK_NAME = ".lock"
TEMPORARY_FOLDER = ".temporary."
"""Prefix of a folder that only its own process uses."""
TRANSIENT_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
"""Errors that a network file system may return once and not a moment later."""
RETRY_AFTER_SECONDS = 1.0


def retry_once(call: Callable[[], T]) -> T:
    """Return the value of `call`; call it a second time if the first fails with a transient error of the file
    system."""
    try:
        return call()
    except OSError as error:
        if error.errno not in TRANSIENT_ERRORS:
            raise
        time.sleep(RETRY_AFTER_SECONDS)
        return call()


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


@contextlib.contextmanager
def content_errors(where: object) -> Iterator[None]:
    """Raise UserError for the errors of the body, which reads a file that may have any content."""
    try:
        yield
    except (OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{where} cannot be read ({reason}); restore, correct or remove it") from None


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
            error.filename = str(path)  # the name that the user gave
        _add_filename(error, path)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8. A byte of a file name that is not UTF-8 becomes \\udcXX, which JSON reads back."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", errors="backslashreplace")))


def read_text(path: Path) -> str:
    return retry_once(lambda: path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON. NaN and infinity raise ValueError, because other readers of JSON fail on them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises OSError, or ValueError if the file is not JSON or contains NaN or infinity."""
    try:
        return json.loads(read_text(path), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is none, or it is incomplete."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder in the body. It is renamed to `path`, replacing an old one, only if the body succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()  # not its parents: a run folder that has vanished is an error
    try:
        yield temporary
        for path_below in temporary.rglob("*"):
            _sync(path_below)
        _sync(temporary)
        if path.exists():  # rename() does not replace a folder that has files
            delete_folder(path)
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _add_filename(error, path)
        raise
    _sync(path.parent)


def delete_folder(path: Path) -> None:
    """Delete a folder: `path` is gone at once. Content that cannot be deleted now is deleted when the run is
    resumed."""
    renamed = path.with_name(f".{path.name}.{os.getpid()}.deleted.tmp")
    os.rename(path, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Append a line and sync; if that fails, the file is restored."""
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
    """Delete what killed writers have left, at any depth or, without `below`, in the folder itself.

    No writer may be running.
    """
    found = folder.rglob(".*.tmp") if below else folder.glob(".*.tmp")
    for left in [*found, *folder.glob(f"{TEMPORARY_FOLDER}*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def nearest_existing(folder: Path) -> Path:
    """Return the folder or, if it is not made yet, the existing one that it will be in."""
    return next(each for each in [folder, *folder.absolute().parents] if each.is_dir())


def is_below(path: Path, folder: Path) -> bool:
    """True if `path` is the folder or below it; neither need exist."""
    return path.resolve().is_relative_to(folder.resolve())


def sha256_of(path: Path) -> str:
    def read_all() -> str:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()

    return retry_once(read_all)


def _add_filename(error: BaseException, path: Path) -> None:
    if isinstance(error, OSError) and error.filename is None:  # a failed write, unlike a failed open, names no file
        error.filename = str(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_file(kind: str, paths: Sequence[Path], suffix: str) -> Path:
    """Return a path in the user's cache for facts about some files, by their paths. Its reader checks that they
    hold."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "resnet_in1k")
    except RuntimeError:  # no home, such as for a container's user without a name: nothing can be written below devnull
        cache = Path(os.devnull, "resnet_in1k")
    names = "\0".join(str(path.absolute()) for path in paths)
    return cache / f"{kind}-{hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}{suffix}"


class FolderLock:
    """Lock a folder until `close` or until this process ends, however it ends.

    Raises:
        UserError: if another process holds the lock, or the file system has no locks.
    """

    def __init__(self, folder: Path):
        import fcntl  # not on all systems, and prediction does not need it

        # A record lock: the kernel releases it with the process, and children such as loader workers do not inherit it.
        self._file = (folder / LOCK_NAME).open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{folder} cannot be locked ({error.strerror}); choose a file system with locks"
                ) from None
            raise UserError(f"{folder} is being written to by {holder}; wait for it or stop it first") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
