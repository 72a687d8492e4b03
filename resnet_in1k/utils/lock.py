"""One process writes to a folder."""

import errno
import fcntl
import os
import socket
from pathlib import Path

from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import LOCK_NAME


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
