"""Accelerate's experiment trackers: one that fails is dropped, and the run goes on."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from resnet_in1k.core.errors import UserError
from resnet_in1k.core.text import first_line


class Trackers:
    """The trackers that `--report-to` names; without one, all calls do nothing."""

    def __init__(self, accelerator: Accelerator, report: Callable[[str], None]):
        self._accelerator, self._report = accelerator, report

    def start(self, project: str, config: dict[str, Any]) -> None:
        """Raises UserError if one cannot be started, as without a login."""
        problem = ""
        try:
            self._accelerator.init_trackers(project, config=config)
        except Exception as error:  # each tracker has errors of its own
            problem = f"--report-to: the tracker cannot be started ({first_line(error)}); fix that, or leave it out"
        if problems := [each for each in gather_object([problem]) if each]:
            raise UserError(problems[0])

    def log(self, record: dict[str, Any]) -> None:
        values = {key: value for key, value in record.items() if key != "kind"}
        self._call(lambda: self._accelerator.log(values, step=record["step"]))

    def finish(self) -> None:
        for tracker in self._accelerator.trackers:
            self._call(tracker.finish)
        self._accelerator.trackers = []

    def _call(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # log.jsonl has everything
            names = ", ".join(tracker.name for tracker in self._accelerator.trackers)
            self._accelerator.trackers = []
            self._report(f"{names} has failed, and is dropped from here on ({first_line(error)})")
