"""The lock of a folder, between processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import ROOT

from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import FolderLock

HOLDER = """
import sys, time
from pathlib import Path
from resnet_in1k.utils.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def start_holder(folder: Path) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=ROOT, **pipes)


@pytest.mark.slow
def test_a_folder_is_locked_until_its_process_ends_however_it_ends(tmp_path: Path):
    holder = start_holder(tmp_path)
    try:
        assert holder.stdout.readline() == "locked\n"
        here = f"process {holder.pid} on {socket.gethostname()}"
        with pytest.raises(UserError, match=f"is being written to by {here}; wait for it or stop it first"):
            FolderLock(tmp_path)
    finally:
        holder.kill()
        holder.wait(timeout=20)
    FolderLock(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with pytest.raises(UserError, match=r"cannot be locked \(No locks available\); choose a file system with locks"):
        FolderLock(tmp_path)
