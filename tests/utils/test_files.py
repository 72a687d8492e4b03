import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RETRY_AFTER_SECONDS", 0)


def failing_once(target: object, name: str, error: OSError, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Let the first call of `target.name` raise `error`; the list receives the arguments of all calls."""
    plain, calls = getattr(target, name), []

    def call(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return plain(*arguments, **options)

    monkeypatch.setattr(target, name, call)
    return calls


def test_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "file"
    target.write_text("old")

    def half(path: Path) -> None:
        assert path.parent == tmp_path  # a rename within one file system
        path.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        files.write_atomically(target, half)
    assert error.value.filename == str(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_write_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """First the content is synced, then the file is renamed, then the folder is synced."""
    order = []
    plain_fsync, plain_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name.split('.')[1:2] or 'folder'}")
        plain_fsync(descriptor)

    def replace(*paths: Path) -> None:
        order.append("rename")
        plain_replace(*paths)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_text(tmp_path / "run" / "file", "new")
    assert order == ["sync ['file']", "rename", "sync folder"]
    assert (tmp_path / "run" / "file").read_text() == "new"


def test_file_is_readable_by_whom_the_umask_says(tmp_path: Path):
    mask = os.umask(0o027)
    try:
        files.write_json(tmp_path / "file.json", {})
    finally:
        os.umask(mask)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == 0o640


def test_json_comes_back_as_it_was_even_with_bytes_that_are_no_utf8(tmp_path: Path):
    value = {"class_names": ["é", os.fsdecode(b"anguila_\xf1")], "loss": 1 / 3}
    files.write_json(tmp_path / "file.json", value)
    assert files.read_json(tmp_path / "file.json") == value
    assert (tmp_path / "file.json").read_bytes().count("é".encode()) == 1
    assert b"\\udcf1" in (tmp_path / "file.json").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_json_is_neither_written_nor_read(tmp_path: Path, value: float):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "file.json", {"loss": value})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.json").write_text(json.dumps({"loss": value}))
    with pytest.raises(ValueError, match="is not JSON"):
        files.read_json(tmp_path / "file.json")


def test_new_folder_replaces_one_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The old one is there until the new one is whole and has its name."""
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "file").write_text("old")
    failing_once(os, "rename", OSError(errno.EIO, "Input/output error"), monkeypatch)

    def replace() -> None:
        with files.replacing(tmp_path / "step") as folder:
            folder.mkdir()
            (folder / "file").write_text("new")
            assert (tmp_path / "step" / "file").read_text() == "old"

    with pytest.raises(OSError, match="No space left"), files.replacing(tmp_path / "step"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="Input/output error"):
        replace()
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert (tmp_path / "step" / "file").read_text() == "old"
    replace()
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert (tmp_path / "step" / "file").read_text() == "new"


def test_temporaries_of_killed_writers_are_removed(tmp_path: Path):
    (tmp_path / ".step_1.77.tmp").mkdir()
    (tmp_path / ".step_1.77.tmp" / "file").write_text("half")
    (tmp_path / ".abc.tmp").mkdir()
    (tmp_path / ".state.json.77.tmp").write_text("{")
    (tmp_path / "notes.tmp").write_text("a user's")
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step_2.77.tmp" / ".file.77.tmp").mkdir(parents=True)
    files.remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "notes.tmp", "step_1"]


def test_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = tmp_path / "log.jsonl"
    files.append_line(log, "one")
    failing_once(os, "fsync", OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    with pytest.raises(OSError, match="No space left") as error:
        files.append_line(log, "two")
    assert error.value.filename == str(log)
    assert log.read_bytes() == b"one\n"
    files.append_line(log, "thrée")
    assert log.read_bytes() == "one\nthrée\n".encode()


@pytest.mark.parametrize(("number", "calls"), [(errno.EIO, 2), (errno.ESTALE, 2), (errno.EDQUOT, 1), (errno.EACCES, 1)])
def test_transient_error_is_retried_once_a_second_later(monkeypatch, tmp_path: Path, number: int, calls: int):
    called, waits = [], []
    monkeypatch.setattr(files, "RETRY_AFTER_SECONDS", 1.0)
    monkeypatch.setattr("time.sleep", waits.append)

    def write(path: Path) -> None:
        called.append(1)
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=f"/file cannot be .*: {os.strerror(number)}$"), files.user_errors():
        files.write_atomically(tmp_path / "file", write)
    assert (len(called), waits) == (calls, [1.0] * (calls - 1))


def test_failure_of_a_write_is_one_line():
    with (
        pytest.raises(UserError, match=r"^--output: a/file cannot be read or written: No space left$"),
        files.user_errors("--output: "),
    ):
        raise OSError(errno.ENOSPC, "No space left", "a/file")
    with pytest.raises(ZeroDivisionError), files.user_errors():  # a bug stays one
        raise ZeroDivisionError


def test_reads_are_retried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file"
    file.write_text("content")
    calls = failing_once(Path, "read_text", OSError(errno.ESTALE, "Stale file handle"), monkeypatch)
    assert files.read_text(file) == "content"
    calls += failing_once(Path, "open", OSError(errno.ESTALE, "Stale file handle"), monkeypatch)
    assert files.sha256_of(file) == hashlib.sha256(b"content").hexdigest()
    assert calls == [(file,), (file,)]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with pytest.raises(UserError, match=r"cannot be locked \(No locks available\); choose a file system with locks"):
        files.lock_folder(tmp_path)
