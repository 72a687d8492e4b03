import time

import pytest
import torch

from resnet_in1k.utils import timing
from resnet_in1k.utils.timing import Lap, Stopwatch, bottleneck, waiting_share


def test_on_the_cpu_sections_are_timed_by_the_host(monkeypatch: pytest.MonkeyPatch):
    readings = iter([10.0, 10.5, 20.0, 23.0, 30.0, 30.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    watch = Stopwatch(torch.device("cpu"))
    for name in ("load", "train", "load"):
        with watch.section(name):
            pass
    lap = watch.lap()
    assert dict(lap) == {"load": 0.75, "train": 3.0}
    assert lap["val"] == 0
    assert waiting_share(lap) == 0.2
    assert watch.lap() == {}


class FakeDevice:
    """A device with a queue: the host launches, work ends later, events record when the queue reached them."""

    def __init__(self) -> None:
        self.host_ms = self.busy_until_ms = 0.0
        self.synchronizations = 0

    def launch(self, milliseconds: float) -> None:
        self.busy_until_ms = max(self.busy_until_ms, self.host_ms) + milliseconds

    def event(self, device: torch.device, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self, device: torch.device) -> None:
        self.host_ms = max(self.host_ms, self.busy_until_ms)


class FakeEvent:
    def __init__(self, device: FakeDevice):
        self.device = device

    def record(self) -> None:
        self.reached_ms = max(self.device.busy_until_ms, self.device.host_ms)

    def synchronize(self) -> None:
        self.device.synchronizations += 1

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.reached_ms - self.reached_ms


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """With timing events."""
    device = FakeDevice()
    monkeypatch.setattr(torch, "Event", device.event)
    monkeypatch.setattr(timing, "capabilities", lambda kind: {"timing_events"} if kind == "cuda" else set())
    return device


def step(watch: Stopwatch, device: FakeDevice, host_load_ms: float, device_train_ms: float) -> None:
    with watch.section("load"):
        device.host_ms += host_load_ms
    with watch.section("train"):
        device.host_ms += 1  # launching takes a moment
        device.launch(device_train_ms)


@pytest.mark.parametrize(
    ("load_ms", "load", "waited"),
    [
        (40, 0.040, 0.04),  # the first batch; after it the device never waited
        # Each next batch comes 400 ms after the step before it was launched; the device was busy for 99 of them.
        (400, 0.400 + 9 * 0.300, 0.75),
    ],
)
def test_on_a_device_loading_is_the_time_it_was_idle(device: FakeDevice, load_ms: float, load: float, waited: float):
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(10):
        step(watch, device, host_load_ms=load_ms, device_train_ms=100)
    assert device.synchronizations == 0
    lap = watch.lap()
    assert lap["load"] == pytest.approx(load, rel=0.01)
    assert lap["train"] == pytest.approx(1.0, rel=0.02)
    assert waiting_share(lap) == pytest.approx(waited, abs=0.02)


def test_a_device_without_events_is_waited_for_at_the_end_of_each_section(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.accelerator, "synchronize", device.synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: device.host_ms / 1000)
    watch = Stopwatch(torch.device("mps"))
    for _ in range(10):
        step(watch, device, host_load_ms=40, device_train_ms=100)
    lap = watch.lap()
    assert lap["load"] == pytest.approx(0.400)  # nothing runs beside it, so each time it is waited for
    assert lap["train"] == pytest.approx(1.010)


@pytest.mark.parametrize(
    ("load", "train", "workers", "advice"),
    [
        (1.0, 99.0, 1, "compute-bound"),
        (37.0, 9.0, 4, "input-bound: needs about 17 more workers, or images resized beforehand"),  # 4 × 46 / 9 = 20.4
        (1.0, 4.0, 2, "input-bound: needs about 1 more worker, or images resized beforehand"),
        (1.0, 4.0, 0, "input-bound: needs about 1 more worker, or images resized beforehand"),
    ],
)
def test_bottleneck_is_named_with_the_number_of_workers_to_add(load: float, train: float, workers: int, advice: str):
    assert bottleneck(Lap(load=load, train=train), workers) == advice
