"""Where did the time go? Measured on the device's own clock, without making the device wait."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up the seconds spent in named sections.

    A GPU works through a queue: when Python has asked for a training step, hardly any of it has happened yet, and
    `time.time()` around it measures how fast Python asks. On CUDA each section is therefore marked by two events in the
    device's queue. A "load" section then lasts as long as the *device* had nothing to do but wait for data, however
    long Python slept in the loader. Reading the sums (`lap`) is the only point where the host waits for the device.

    Elsewhere work is synchronous and the host's clock tells the truth.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pending: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        if self._device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._pending[name].append((start, end))
        else:
            start_seconds = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start_seconds

    def lap(self) -> "Lap":
        """The seconds of each section since the last lap. A host-device synchronisation."""
        for name, events in self._pending.items():
            for start, end in events:
                end.synchronize()
                self._seconds[name] += start.elapsed_time(end) / 1000
        lap = Lap(self._seconds)
        self._pending.clear()
        self._seconds = defaultdict(float)
        return lap


class Lap(dict[str, float]):
    """Seconds by section; a section that never ran took 0."""

    def __missing__(self, name: str) -> float:
        return 0.0

    def add(self, other: "Lap") -> None:
        for name, seconds in other.items():
            self[name] += seconds

    @property
    def waiting_share(self) -> float:
        """The share of training time, from 0 to 1, that the device waited for data."""
        total = self["load"] + self["train"]
        return self["load"] / total if total else 0.0


WAITING_SHARE_WORTH_SAYING = 0.10


def diagnose(lap: Lap, workers: int) -> str:
    """Which binds, loading or computing; and if loading, what would mend it.

    While the device waits, `workers` workers make a batch in load + train seconds; to keep up they must need no more
    than the train seconds.
    """
    if lap.waiting_share <= WAITING_SHARE_WORTH_SAYING:
        return "compute-bound"
    more = math.ceil(max(workers, 1) * lap["load"] / lap["train"])
    return f"input-bound: needs about {more} more worker{'s' * (more > 1)}, or images resized beforehand"


def duration(seconds: float) -> str:
    """To two places, as one says it: 40 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    for (size, unit), (smaller_size, smaller_unit) in [
        ((86_400, "d"), (3_600, "h")),
        ((3_600, "h"), (60, "min")),
        ((60, "min"), (1, "s")),
    ]:
        if seconds >= size:
            whole, rest = divmod(round(seconds / smaller_size), size // smaller_size)
            return f"{whole} {unit} {rest} {smaller_unit}"
    return f"{seconds:.0f} s"


def size(num_bytes: float) -> str:
    """In the units that `df -h` and shops use: 512 MB, 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
