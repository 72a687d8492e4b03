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
from typing import Any, TextIO, TypeVar

from safetensors import SafetensorError

from resnet_in1k.utils.errors import UserError

T = TypeVar("T")

LOCK_NAME = ".lock"
TEMPORARY = ".*.tmp"
"""Names of what killed writers leave."""
TRANSIENT_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
"""Errors that a network file system may return once and not a moment later."""
RETRY_AFTER_SECONDS = 1.0


def retry_once(call: Callable[[], T]) -> T:
    """Return the value of `call`, which is called again if it fails with a transient error of the file system."""
    try:
        return call()
    except OSError as error:
        if error.errno not in TRANSIENT_ERRORS:
            raise
        time.sleep(RETRY_AFTER_SECONDS)
        return call()


@contextlib.contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Raise UserError for an OSError in the body: a prefix such as "--output: ", the file and the system's reason."""
    try:
        yield
    except OSError as error:
        name, reason = error.filename or "a file", error.strerror or error
        raise UserError(f"{prefix}{name} cannot be read or written: {reason}") from None


@contextlib.contextmanager
def content_errors(where: object, cure: str = "restore, correct or remove it") -> Iterator[None]:
    """Raise UserError for the errors of the body, which reads a file that may have any content."""
    try:
        yield
    except (OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{where} cannot be read ({reason}); {cure}") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, where the body makes a file or folder. It replaces `path` only if the body succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _remove(temporary)
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            _sync(written)
        if temporary.is_dir() and path.exists():  # rename() does not replace a folder that has files
            delete_folder(path)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(temporary)
        # A failed write, unlike a failed open, names no file; and the user gave `path`.
        if isinstance(error, OSError) and error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)
        raise
    _sync(path.parent)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Replace `path` by the file that `write` makes at a temporary path. A transient error is retried once."""

    def attempt() -> None:
        with replacing(path) as temporary:
            write(temporary)

    retry_once(attempt)


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


def delete_folder(path: Path) -> None:
    """Delete a folder: `path` is gone at once. What cannot be deleted now is deleted when the run is resumed."""
    renamed = path.with_name(f".{path.name}.{os.getpid()}.deleted.tmp")
    os.rename(path, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Append a line and sync; if that fails, the file is restored."""
    data = line.encode("utf-8") + b"\n"
    with path.open("ab", buffering=0) as file:  # a buffer would be written again when the file is closed
        size = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            error.filename = str(path)
            raise


def remove_temporaries(folder: Path, pattern: str = f"**/{TEMPORARY}") -> None:
    """Delete what killed writers have left, by default at any depth. No writer may be running."""
    for left in [*folder.glob(pattern)]:
        _remove(left)


def nearest_existing(folder: Path) -> Path:
    """Return the folder or, if it is not made yet, the existing one that it will be in."""
    return next(each for each in [folder, *folder.absolute().parents] if each.is_dir())


def sha256_of(path: Path) -> str:
    def read_all() -> str:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()

    return retry_once(read_all)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_file(kind: str, paths: Sequence[Path], suffix: str) -> Path:
    """Return a path in the user's cache for facts about these files. Whoever reads it checks that they still hold."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "resnet_in1k")
    except RuntimeError:  # no home, such as for a container's user without a name: nothing can be written below devnull
        cache = Path(os.devnull, "resnet_in1k")
    names = "\0".join(str(path.absolute()) for path in paths)
    return cache / f"{kind}-{hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}{suffix}"


def lock_folder(folder: Path) -> TextIO:
    """Lock a folder until the returned file is closed or this process ends, however it ends. Raises UserError."""
    import fcntl  # not on all systems, and prediction does not need it

    file = (folder / LOCK_NAME).open("a+")
    try:
        # A record lock: the kernel releases it with the process, and children such as loader workers do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            file.seek(0)
            holder = file.read().strip() or "another process"
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{folder} is being written to by {holder}; wait for it or stop it first") from None
        raise UserError(f"{folder} cannot be locked ({error.strerror}); choose a file system with locks") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
