"""Time of the parts of a run, measured on the device's own clock, without making the host wait for the device."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator

import torch

from resnet_in1k.utils.device import capabilities
from resnet_in1k.utils.format import count

Lap = Counter
"""Seconds by section; a section that never ran took 0, and `update` adds."""


class Stopwatch:
    """Sum the seconds that named sections take.

    A GPU works through a queue: when Python has launched a training step, hardly any of it is done, and `time.time()`
    around it measures how fast Python launches kernels. So if the device has timing events, two events in its queue
    mark each section. A "load" section then lasts as long as the device had nothing to do but wait for data, however
    long Python waited for the loader. The host waits for the device only in `lap`.

    A device without timing events is waited for at the end of each section. A CPU works synchronously, so the host's
    clock is right.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pending: list[tuple[str, torch.Event, torch.Event]] = []
        self._seconds = Lap()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        if "timing_events" in capabilities(self._device.type):
            start, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pending.append((name, start, end))
        else:
            start_seconds = time.perf_counter()
            yield
            synchronize(self._device)
            self._seconds[name] += time.perf_counter() - start_seconds

    def lap(self) -> Lap:
        """Return the seconds of each section since the last lap. A host-device synchronization."""
        for name, start, end in self._pending:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        lap, self._seconds, self._pending = self._seconds, Lap(), []
        return lap


def synchronize(device: torch.device) -> None:
    """Let the host wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def waiting_share(lap: Lap) -> float:
    """Return the share of the training time, from 0 to 1, in which the device waited for data."""
    total = lap["load"] + lap["train"]
    return lap["load"] / total if total else 0.0


def bottleneck(lap: Lap, num_workers: int) -> str:
    """Return "compute-bound" or, if the device waits for more than a tenth of the time, how many workers to add."""
    if waiting_share(lap) <= 0.1:
        return "compute-bound"
    # The workers make a batch in load + train seconds; to keep up they may take only the train seconds.
    more = math.ceil(max(num_workers, 1) * lap["load"] / lap["train"])
    return f"input-bound: needs about {count(more, 'more worker')}, or images resized beforehand"
