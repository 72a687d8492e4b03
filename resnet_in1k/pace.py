"""How fast a run goes and when it will be over, told once it has found its stride."""

import contextlib
import datetime
import time
from collections.abc import Iterator

import torch

from resnet_in1k.console import Console
from resnet_in1k.plan import Plan
from resnet_in1k.stopwatch import duration


class Pace:
    """Counts the steps from `first_step` on, and speaks after the 50th."""

    WARMUP_STEPS = 10
    """Not measured: workers start, kernels are chosen."""
    TOLD_AFTER_STEPS = 50

    def __init__(self, plan: Plan, device: torch.device, console: Console, first_step: int):
        self._plan, self._device, self._console, self._first_step = plan, device, console, first_step
        self._start_seconds = 0.0

    def step_done(self, step: int) -> None:
        steps_done = step - self._first_step + 1
        if steps_done == self.WARMUP_STEPS:
            self._start_seconds = self._now()
        elif steps_done == self.TOLD_AFTER_STEPS:
            self._tell(step, (self._now() - self._start_seconds) / (self.TOLD_AFTER_STEPS - self.WARMUP_STEPS))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training, which is not to be counted."""
        paused_seconds = self._now()
        yield
        self._start_seconds += self._now() - paused_seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # seldom: around epochs' ends and checkpoints, and twice besides
        return time.monotonic()

    def _tell(self, step: int, seconds_per_step: float) -> None:
        left_seconds = (self._plan.total_steps - step) * seconds_per_step
        end = datetime.datetime.now() + datetime.timedelta(seconds=left_seconds)
        self._console.say(
            f"{self._plan.recipe.global_batch_size / seconds_per_step:,.0f} images/s: about {duration(left_seconds)} "
            f"of training to go, until {end:%a %d %b %H:%M}, and the validations"
        )
