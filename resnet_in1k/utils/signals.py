"""Signals to stop: all processes agree at which step, save, and exit with a status of its own."""

import os
import signal
import threading
import time
from types import FrameType

from resnet_in1k.utils.console import in_notebook, replace_lost_terminal
from resnet_in1k.utils.launch import Launch, launcher_has_ended

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
POLL_EVERY = 4
"""Steps or batches between two exchanges of pending signals, with several processes."""
ECHO_SECONDS = 2.0
"""A launcher forwards signals that the terminal has already sent to its processes; that is not a second request yet."""


class StopSignals:
    """Catch SIGTERM, SIGINT (Ctrl-C), SIGUSR1, and SIGHUP unless it is ignored (nohup), in the body of a `with`; a
    second one ends the process at once.

    A handler runs only in the process that received the signal, so it just stores its name. `stop_requested`
    exchanges the names without a collective, so that all processes stop at the same step. Python runs no handler
    while the process is blocked in a collective; therefore a thread watches for the second signal. In a notebook, whose
    kernel must survive, the second signal raises KeyboardInterrupt.
    """

    def __enter__(self) -> "StopSignals":
        self._stopped_by = ""
        received, self._wakeup_fd = os.pipe()
        os.set_blocking(self._wakeup_fd, False)
        threading.Thread(target=_exit_at_second_signal, args=(received,), daemon=True).start()
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in {*SIGNALS} - ignored}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that was not set from Python
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        os.close(self._wakeup_fd)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopped_by and in_notebook():
            raise KeyboardInterrupt
        self._stopped_by = self._stopped_by or signal.Signals(number).name
        if number == signal.SIGHUP:
            replace_lost_terminal()

    def stop_requested(self, launch: Launch, count: int) -> str:
        """Return the signal that any process has received, else ""; the same on all processes, which call it with the
        same sequence of counts, of steps or batches."""
        if launcher_has_ended():
            self._stopped_by = self._stopped_by or "the end of its launcher"
        return "" if count % POLL_EVERY and launch.world_size > 1 else launch.stop_requested(self._stopped_by)


def _exit_at_second_signal(received: int) -> None:
    """Read the numbers of arriving signals until the writing end of the pipe is closed."""
    first_seconds = None
    with open(received, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in SIGNALS:
                continue  # such as SIGCHLD
            if first_seconds is None:
                first_seconds = time.monotonic()
            elif time.monotonic() - first_seconds > ECHO_SECONDS and not in_notebook():
                os._exit(128 + number[0])  # safe at any moment, because files are replaced atomically
