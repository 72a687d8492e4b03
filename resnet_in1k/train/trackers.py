"""Accelerate's experiment trackers: a resumed run goes on in theirs; one that fails is dropped, and the run goes on."""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from resnet_in1k.utils import files
from resnet_in1k.utils.distributed import Launch
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

TO_GO_ON: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "tensorboard": lambda run_id, first_step: {"purge_step": first_step},  # hides what was taken back
    "trackio": lambda run_id, first_step: {"name": run_id, "resume": "allow"},
    "wandb": lambda run_id, first_step: {"id": run_id, "resume": "allow"},
}
"""How each tracker is started to go on in the run of an id from a step on; the others begin a run at each start."""


class Trackers:
    """The tracker that `--report-to` names; without one, all calls do nothing."""

    def __init__(self, accelerator: Accelerator, report: Callable[[str], None]):
        self._accelerator, self._report = accelerator, report

    def start(self, launch: Launch, file: Path, project: str, config: dict[str, Any], first_step: int) -> None:
        """Go on in the tracker's run that `file` names; if it names none, begin one, and write it there.

        Args:
            file: RUN/tracker.json, with project and id of a run by the tracker's name.
            project: of a run that begins.
            config: the settings of a run that begins.
            first_step: from which on steps are logged; those that were logged before have been taken back.

        Raises:
            UserError: on all processes, if it cannot be started, as without a login, or if `file` will not do.
        """
        launch.broadcast_from_main(lambda: self._start(file, project, config, first_step), "starts the tracker")

    def _start(self, file: Path, project: str, config: dict[str, Any], first_step: int) -> None:
        (name,) = map(str, self._accelerator.log_with)
        runs = _read_runs(file)
        begins = name not in runs
        run = {"project": project, "id": _new_id()} if begins else runs[name]
        how = TO_GO_ON[name](run["id"], first_step) if name in TO_GO_ON else {}
        try:
            # Not again if it goes on: TensorBoard would show each start's settings as a run of their own.
            self._accelerator.init_trackers(run["project"], _as_text(config) if begins else None, {name: how})
            if name == "wandb":  # see `log`
                self._accelerator.get_tracker(name, unwrap=True).define_metric("*", step_metric="step")
        except Exception as error:  # each tracker has errors of its own
            advice = "" if begins else f", or remove {file} to begin a new run"
            raise UserError(
                f"--report-to: the tracker cannot be started ({first_line(error)}); fix that, or leave it out{advice}"
            ) from None
        runs[name] = run
        if name in TO_GO_ON and (problem := files.failure_of(lambda: files.write_json(file, runs))):
            raise UserError(problem)

    def log(self, record: dict[str, Any]) -> None:
        values = {key: value for key, value in record.items() if key not in ("kind", "step")}
        for tracker in self._accelerator.trackers:  # on the main process alone
            if tracker.name == "wandb":  # it drops the values of a step that goes back, as after a resume
                self._call(tracker.log, {**values, "step": record["step"]})
            else:
                self._call(tracker.log, values, step=record["step"])

    def finish(self) -> None:
        for tracker in self._accelerator.trackers:
            self._call(tracker.finish)
        self._accelerator.trackers = []

    def _call(self, call: Callable[..., None], *arguments: Any, **named: Any) -> None:
        try:
            call(*arguments, **named)
        except Exception as error:  # log.jsonl has everything
            names = ", ".join(tracker.name for tracker in self._accelerator.trackers)
            self._accelerator.trackers = []
            self._report(f"{names} has failed, and is dropped from here on ({first_line(error)})")


def _new_id() -> str:
    """Of a tracker's run: two run folders may have the same name."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def _read_runs(file: Path) -> dict[str, dict[str, str]]:
    if not file.exists():
        return {}
    try:
        runs = files.read_json(file)
        return {name: {key: str(run[key]) for key in ("project", "id")} for name, run in runs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} does not name the tracker's run ({type(error).__name__}: {error}); remove it to begin a new one"
        ) from None


def _as_text(config: dict[str, Any]) -> dict[str, Any]:
    """Lists as text: not every tracker takes them."""
    return {name: str(value) if isinstance(value, tuple) else value for name, value in config.items()}
