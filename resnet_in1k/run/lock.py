"""One process writes to a run folder."""

import errno
import fcntl
import os
import socket

from resnet_in1k.core.errors import UserError
from resnet_in1k.run.folder import RunFolder


class RunLock:
    """Locks a run folder until this process ends, however it ends.

    A record lock: the kernel releases it with the process, and children, such as loader workers, do not inherit it.

    Raises:
        UserError: if another process holds it.
    """

    def __init__(self, run: RunFolder):
        self._file = run.lock.open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{run.path} cannot be locked ({error.strerror}); put the run folder on a file system with locks"
                ) from None
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            raise UserError(f"{run.path} is being written to by {holder}; wait for it or stop it first") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
