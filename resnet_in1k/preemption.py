"""Asked to stop: every process agrees when, saves, and leaves with a status that says so."""

import os
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed
from accelerate import Accelerator

import resnet_in1k

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_EVERY = 4
"""Steps or batches between two agreements of several processes."""
ECHO_SECONDS = 2.0
"""A launcher passes on to its processes what the terminal has already sent them: not a second request yet."""
LAUNCHER_ENDED = 255
"""Noted as a signal is, and none is as high: the launcher was killed, and passes nothing on any more."""


class Preemption:
    """Watches for SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 in the body of a `with`; a second one ends the process at once.

    A handler may do next to nothing, and it runs in the process that got the signal only. So it leaves a note, and
    `agreed` lets all processes look at all notes, over the CPU: no process stops where another goes on to wait for it.
    Nor does it run while this process waits for another, which may be for ever: of a second signal a thread takes care.
    """

    def __init__(self) -> None:
        self._signal = 0
        launched = {"ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"} & os.environ.keys()  # only launchers set these
        self._launcher = resnet_in1k.STARTED_BY if launched else None
        self._group: torch.distributed.ProcessGroup | None = None
        """Of all processes; None while this one decides alone."""

    def __enter__(self) -> "Preemption":
        heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        threading.Thread(target=_end_at_the_second, args=(heard,), daemon=True).start()
        self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python knows nothing of
        signal.set_wakeup_fd(self._told_before)
        os.close(self._told)

    def agree_with_others(self, accelerator: Accelerator) -> None:
        """From now on all processes must ask `agreed` alike."""
        if accelerator.num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    def agreed(self, count: int) -> str:
        """The signal's name if any process has got one, else "". All processes must ask with the same counts."""
        if not self._signal and self._launcher not in (None, os.getppid()):
            self._signal = LAUNCHER_ENDED
        if self._group is None:
            return _name(self._signal)
        if count % POLL_EVERY:
            return ""
        note = torch.tensor([self._signal])
        torch.distributed.all_reduce(note, torch.distributed.ReduceOp.MAX, group=self._group)
        return _name(int(note))


def _name(number: int) -> str:
    if number == LAUNCHER_ENDED:
        return "its launcher's end"
    return signal.Signals(number).name if number else ""


def _end_at_the_second(heard: int) -> None:
    """Read the numbers of arriving signals until nobody is left to write them."""
    first_seconds = None
    with open(heard, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in SIGNALS:
                continue  # as of a child's end
            if first_seconds is None:
                first_seconds = time.monotonic()
            elif time.monotonic() - first_seconds > ECHO_SECONDS:
                os._exit(128 + number[0])  # at once: files are whole or not there, whatever is interrupted
