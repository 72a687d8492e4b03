import itertools
from types import SimpleNamespace

import pytest
import torch

from resnet_in1k.pace import Pace


def test_speed_and_end_are_told_once_after_fifty_steps(tiny, monkeypatch: pytest.MonkeyPatch):
    """A step a second from the 10th to the 50th; a validation of 20 s between them does not count."""
    said, clock = [], itertools.count()
    plan = SimpleNamespace(total_steps=3770, recipe=tiny)
    pace = Pace(plan, torch.device("cpu"), SimpleNamespace(say=said.append), first_step=101)
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 + 20.0 * next(clock))  # asked at 110, 120 twice, and 150
    for step in range(101, 301):
        pace.step_done(step)
        if step == 120:
            with pace.paused():
                pass
    (line,) = said
    assert line.startswith("8 images/s: about 1 h 0 min of training to go, until ")


def test_a_short_run_is_over_before_it_is_told(tiny):
    said: list[str] = []
    plan = SimpleNamespace(total_steps=40, recipe=tiny)
    pace = Pace(plan, torch.device("cpu"), SimpleNamespace(say=said.append), first_step=1)
    for step in range(1, 41):
        pace.step_done(step)
    assert said == []
