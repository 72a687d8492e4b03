"""The log of a training run: records in log.jsonl and for trackers, and lines on the terminal."""

import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from resnet_in1k.evaluate.evaluation import Evaluation
from resnet_in1k.optim.lr import lr_at
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.checkpoint import TrainState
from resnet_in1k.train.writer import RunWriter
from resnet_in1k.utils import files
from resnet_in1k.utils.console import print_line
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import duration, first_line, shorten
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.timing import Lap, Stopwatch, bottleneck, waiting_share


class TrainLog:
    """Collect losses and times, and write them when the loop asks for it."""

    def __init__(
        self,
        counts: StepCounts,
        folder: RunFolder,
        writer: RunWriter,
        accelerator: Accelerator,
        *,
        log_every: int,
        num_workers: int,
        dollars_per_hour: float = 0.0,
    ):
        self.stopwatch = Stopwatch(accelerator.device)
        self.trackers = Trackers(accelerator, print_line)
        self._counts, self._folder, self._writer = counts, folder, writer
        self._accelerator, self._log_every, self._num_workers = accelerator, log_every, num_workers
        self._dollars_per_hour = dollars_per_hour
        self._uncollected_losses: list[torch.Tensor] = []
        self._epoch_lap = Lap()
        self._steps_since_lap = 0
        self._start_seconds = time.monotonic()

    def add(self, loss: torch.Tensor) -> None:
        """Keep the loss of a step of this process, (), on the device until it is collected."""
        self._uncollected_losses.append(loss)
        self._steps_since_lap += 1

    def collect_losses(self) -> list[float]:
        """Return the losses since the last call, averaged over all processes. A host-device synchronization."""
        if not self._uncollected_losses:
            return []
        losses = self._accelerator.reduce(torch.stack(self._uncollected_losses), reduction="mean").tolist()
        self._uncollected_losses.clear()
        return losses

    def write_nonfinite_loss(self, step: int, loss: float, image_names: list[str]) -> UserError:
        """List the images of the batch and return the error that ends the run."""
        self._writer.write_list(self._folder.nonfinite_batch, image_names)
        return UserError(
            f"the loss of step {step:,} (epoch {self._counts.epoch_of(step)}, lr {lr_at(step, self._counts):g}) is "
            f"{loss}; nothing was saved since, the checkpoints before it are intact; the images of the batch are "
            f"listed in {self._folder.nonfinite_batch}; try a lower --lr, longer --warmup-epochs, or --precision fp32, "
            "in another --output-dir"
        )

    def write_steps(self, state: TrainState, step: int) -> None:
        """Write the record of the steps since the last one, after their losses were collected."""
        lap, counts = self._lap(), self._counts
        num_steps = (counts.steps_into_epoch(step) - 1) % self._log_every + 1
        measured_steps, self._steps_since_lap = self._steps_since_lap, 0  # fewer, if the run was resumed in between
        record = {
            "kind": "train",
            "epoch": counts.epoch_of(step),
            "step": step,
            "loss": mean(state.epoch_losses[-num_steps:]),
            "lr": lr_at(step, counts),
            "images_per_second": measured_steps * counts.recipe.global_batch_size / (lap["load"] + lap["train"]),
            "load_seconds": lap["load"] / measured_steps,
            "train_seconds": lap["train"] / measured_steps,
        }
        self._write(record)
        left_seconds = (counts.total_steps - step) * (record["load_seconds"] + record["train_seconds"])
        print_line(
            f"epoch {record['epoch']}/{counts.recipe.epochs}  step {step:,}/{counts.total_steps:,}  "
            f"loss {record['loss']:.4f}  lr {record['lr']:.3g}  {record['images_per_second']:,.0f} images/s  "
            f"a batch: load {record['load_seconds'] * 1000:.1f} ms, train {record['train_seconds'] * 1000:.1f} ms  "
            f"{duration(left_seconds)} of training left{self._bottleneck(lap)}"
        )

    def write_epoch(self, state: TrainState, evaluations: list[Evaluation]) -> None:
        """Write the record of the epoch that ends with the state's step.

        Args:
            evaluations: of all weights.
        """
        publish = self._counts.recipe.publish
        evaluation = next(each for each in evaluations if each.weights == publish)
        others = [each for each in evaluations if each is not evaluation]
        self._lap()
        lap, self._epoch_lap = self._epoch_lap, Lap()
        record = {
            "kind": "epoch",
            "epoch": self._counts.epoch_of(state.step),
            "step": state.step,
            "train_loss": mean(state.epoch_losses),
            "val_loss": evaluation.loss,
            "top1_accuracy": evaluation.top1_accuracy,
            "top5_accuracy": evaluation.top5_accuracy,
            "load_seconds": lap["load"],
            "train_seconds": lap["train"],
            "val_seconds": lap["val"],
            "lr": lr_at(state.step, self._counts),
        }
        if self._dollars_per_hour:
            record["dollars"] = sum(lap.values()) / 3600 * self._dollars_per_hour
        if others:
            record["weights"] = evaluation.weights
        for other in others:
            record[f"{other.weights}_val_loss"] = other.loss
            record[f"{other.weights}_top1_accuracy"] = other.top1_accuracy
            record[f"{other.weights}_top5_accuracy"] = other.top5_accuracy
        self._write(record)
        print_line(
            f"epoch {record['epoch']}/{self._counts.recipe.epochs} done  train loss {record['train_loss']:.4f}  "
            f"{evaluation.summary()}\n"
            + "".join(f"  {evaluation.weights} above, {each.weights}: {each.summary()}\n" for each in others)
            + f"  load {lap['load']:.1f} s, train {lap['train']:.1f} s, validate {lap['val']:.1f} s; "
            f"waited for data {waiting_share(lap):.1%} of the training time{self._bottleneck(lap)}"
        )
        if evaluation.bad_images:
            print_line(f"  unreadable: {shorten(list(evaluation.bad_images))}")
        bad = [f"{name} ({reason})" for name, reason in evaluation.bad_images.items()]
        self._writer.write_list(self._folder.bad_val_images, bad)

    def write_end(self, state: TrainState) -> None:
        """Print the result, where everything is, and what to do next."""
        folder = self._folder
        rows = [
            (folder.weights, "the best weights"),
            (folder.evaluation, "their accuracy"),
            (folder.curves.with_suffix(".png"), "loss and accuracy, also as .svg"),
            (folder.log, "every number printed above"),
        ]
        width = max(len(str(path)) for path, _ in rows)
        price = sum(record.get("dollars", 0.0) for record in folder.records())
        print_line(
            f"done in {duration(time.monotonic() - self._start_seconds)}"
            + (f", {price:,.2f} dollars in all" if price else "")
            + f": best top-1 {state.best_top1_accuracy:.2%} after epoch {self._counts.epoch_of(state.best_step)}\n"
            + "".join(f"  {path!s:<{width}}  {what}\n" for path, what in rows)
            + f"evaluate them:  python scripts/evaluate.py --ckpt {folder.path}\n"
            f'use them:       from resnet_in1k import ResNet; model = ResNet.from_pretrained("{folder.path}")'
        )

    def stopped_message(self, stopped_by: str, step: int) -> str:
        if step == 0:
            return f"stopped by {stopped_by} before training started; start with the same command and --resume"
        return (
            f"stopped by {stopped_by} after step {step:,} of {self._counts.total_steps:,}, everything is saved in "
            f"{self._folder.path}; resume with the same command and --resume"
        )

    def _lap(self) -> Lap:
        """Return the times since the last lap, of the process that waited longest for data."""
        # In the other processes the same time is part of the step, in which they wait for that one's gradients.
        names = ("load", "train", "val")
        own = self.stopwatch.lap()
        row = torch.tensor([[own[name] for name in names]], device=self._accelerator.device)
        lap = Lap(dict(zip(names, max(self._accelerator.gather(row).tolist()), strict=True)))  # "load" comes first
        self._epoch_lap.update(lap)
        return lap

    def _write(self, record: dict[str, Any]) -> None:
        self._writer.append(record)
        self.trackers.log(record)

    def _bottleneck(self, lap: Lap) -> str:
        advice = bottleneck(lap, self._num_workers)
        return "" if advice == "compute-bound" else f": {advice}"


def mean(values: list[float]) -> float:
    """Exactly rounded mean, so that it does not depend on how the values were collected."""
    return math.fsum(values) / len(values)


RESUME_ARGUMENTS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "tensorboard": lambda run_id, first_step: {"purge_step": first_step},  # hides the steps that are trained again
    "trackio": lambda run_id, first_step: {"name": run_id, "resume": "allow"},
    "wandb": lambda run_id, first_step: {"id": run_id, "resume": "allow"},
}
"""Arguments with which a tracker continues the run of that id at a step. Other trackers begin a run at each start."""


class Trackers:
    """The Accelerate tracker that `--report-to` names; without one, all calls do nothing.

    A resumed run continues in the tracker's run. A tracker that fails during training is disabled.
    """

    def __init__(self, accelerator: Accelerator, report: Callable[[str], None]):
        self._accelerator, self._report = accelerator, report

    def start(self, launch: Launch, file: Path, project: str, config: dict[str, Any], first_step: int) -> None:
        """Continue the tracker's run that `file` names; if it names none, begin one and write it there.

        Args:
            file: RUN/tracker.json, with project and id of a run by the tracker's name.
            project: of a new run.
            config: settings of a new run.
            first_step: first step to log; those that were logged from there on will be trained again.

        Raises:
            UserError: on all processes, if it cannot be started, such as without a login, or if `file` is damaged.
        """
        launch.broadcast_from_main(lambda: self._start(file, project, config, first_step), "starting the tracker")

    def _start(self, file: Path, project: str, config: dict[str, Any], first_step: int) -> None:
        (name,) = map(str, self._accelerator.log_with)
        runs = _read_tracker_runs(file)
        is_new = name not in runs
        if is_new:  # with an id of its own, because two run folders may have the same name
            run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
            runs[name] = {"project": project, "id": run_id}
        arguments = RESUME_ARGUMENTS[name](runs[name]["id"], first_step) if name in RESUME_ARGUMENTS else {}
        # Lists as text, which every tracker takes. Not for a resume: TensorBoard would show the settings again as a
        # run.
        config = {key: str(value) if isinstance(value, tuple) else value for key, value in config.items()}
        try:
            self._accelerator.init_trackers(runs[name]["project"], config if is_new else None, {name: arguments})
            if name == "wandb":  # see `log`
                self._accelerator.get_tracker(name, unwrap=True).define_metric("*", step_metric="step")
        except Exception as error:  # each tracker has errors of its own
            advice = "" if is_new else f", or remove {file} to begin a new run"
            raise UserError(
                f"--report-to: the tracker cannot be started ({first_line(error)}); fix that, or omit the flag{advice}"
            ) from None
        if name in RESUME_ARGUMENTS:
            with files.user_errors():
                files.write_json(file, runs)

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
        except Exception as error:  # log.jsonl has every record
            names = ", ".join(tracker.name for tracker in self._accelerator.trackers)
            self._accelerator.trackers = []
            self._report(f"logging to {names} failed ({first_line(error)}); it is disabled for the rest of the run")


def _read_tracker_runs(file: Path) -> dict[str, dict[str, str]]:
    if not file.exists():
        return {}
    try:
        runs = files.read_json(file)
        return {name: {key: str(run[key]) for key in ("project", "id")} for name, run in runs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} does not name the tracker's run ({type(error).__name__}: {error}); remove it to begin a new run"
        ) from None
