"""What a training run reports: records in log.jsonl and for the trackers, and lines on the terminal."""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.sampler import TrainOrder
from resnet_in1k.evaluate.evaluation import Evaluation
from resnet_in1k.optim.lr import lr_at
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.checkpoint import TrainState
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.train.trackers import Trackers
from resnet_in1k.train.writer import RunWriter
from resnet_in1k.utils.console import Console
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import duration, shorten
from resnet_in1k.utils.timing import REPORTED_WAITING_SHARE, Lap, Stopwatch, bottleneck


class TrainLog:
    """Collects losses and times, and writes them every `log_every` steps and at each epoch's end."""

    def __init__(
        self,
        schedule: StepCounts,
        folder: RunFolder,
        writer: RunWriter,
        accelerator: Accelerator,
        console: Console,
        options: TrainOptions,
        workers: int,
    ):
        self.stopwatch = Stopwatch(accelerator.device)
        self.trackers = Trackers(accelerator, console.print)
        self._schedule, self._folder, self._writer, self._console = schedule, folder, writer, console
        self._accelerator, self._log_every, self._workers = accelerator, options.log_every, workers
        self._dollars_per_hour = options.dollars_per_hour
        self._uncollected_losses: list[torch.Tensor] = []
        self._epoch_lap = Lap()
        self._steps_since_lap = 0
        self._start_seconds = 0.0

    def start(self) -> None:
        """Training starts now."""
        self._start_seconds = time.monotonic()

    def add(self, loss: torch.Tensor) -> None:
        """The loss of a step of this process, (), on the device: it stays there until it is collected."""
        self._uncollected_losses.append(loss)
        self._steps_since_lap += 1

    def is_due(self, step: int) -> bool:
        return self._schedule.steps_into_epoch(step) % self._log_every == 0 or self._schedule.is_last_in_epoch(step)

    def collect_losses(self, step: int, state: TrainState, source: Source) -> None:
        """Bring the losses up to `step`, averaged over all processes, to the state: a synchronization.

        Raises:
            UserError: if one is not finite; no weights have changed since.
        """
        if not self._uncollected_losses:
            return
        first_step = step - len(self._uncollected_losses) + 1
        losses = self._accelerator.reduce(torch.stack(self._uncollected_losses), reduction="mean").tolist()
        self._uncollected_losses.clear()
        for number, loss in enumerate(losses, start=first_step):
            if not math.isfinite(loss):
                self._stop_at_nonfinite_loss(number, loss, source)
        state.epoch_losses.extend(losses)

    def _stop_at_nonfinite_loss(self, step: int, loss: float, source: Source) -> None:
        (batch,) = TrainOrder(self._schedule_of_one_process(), step, step, labels=source.labels)
        self._writer.write_list(
            self._folder.nonfinite_batch, [source.image_name(sample.index) for sample in batch.samples]
        )
        raise UserError(
            f"the loss of step {step:,} (epoch {self._schedule.epoch_of(step)}, lr {lr_at(step, self._schedule):g}) is "
            f"{loss}; no weights were changed since, and the checkpoints before it stay; its images are listed in "
            f"{self._folder.nonfinite_batch}; try a lower --lr, longer --warmup-epochs, or --precision fp32, in "
            "another --output-dir"
        )

    def _schedule_of_one_process(self) -> StepCounts:
        return StepCounts(self._schedule.recipe, 1, 1, self._schedule.num_train_images)

    def write_steps(self, step: int, state: TrainState) -> None:
        """The record of the steps since the last one, once their losses are collected."""
        lap = self._lap()
        schedule = self._schedule
        num_steps = (schedule.steps_into_epoch(step) - 1) % self._log_every + 1
        measured_steps, self._steps_since_lap = self._steps_since_lap, 0  # fewer, if the run was resumed between
        losses = state.epoch_losses[-num_steps:]
        record = {
            "kind": "train",
            "epoch": schedule.epoch_of(step),
            "step": step,
            "loss": mean(losses),
            "lr": lr_at(step, schedule),
            "images_per_second": measured_steps * schedule.recipe.global_batch_size / (lap["load"] + lap["train"]),
            "load_seconds": lap["load"] / measured_steps,
            "train_seconds": lap["train"] / measured_steps,
        }
        self._write(record)
        left_seconds = (schedule.total_steps - step) * (record["load_seconds"] + record["train_seconds"])
        self._console.print(
            f"epoch {record['epoch']}/{schedule.recipe.epochs}  step {step:,}/{schedule.total_steps:,}  "
            f"loss {record['loss']:.4f}  lr {record['lr']:.3g}  {record['images_per_second']:,.0f} images/s  "
            f"a batch: load {record['load_seconds'] * 1000:.1f} ms, train {record['train_seconds'] * 1000:.1f} ms"
            f"  {duration(left_seconds)} of training left" + self._bottleneck(lap)
        )

    def write_epoch(self, state: TrainState, evaluations: list[Evaluation]) -> None:
        """The record of the epoch that ends with the state's step, by the evaluations of all weights, of which the last
        are those that the recipe publishes."""
        *others, evaluation = evaluations
        self._lap()
        lap, self._epoch_lap = self._epoch_lap, Lap()
        record = {
            "kind": "epoch",
            "epoch": self._schedule.epoch_of(state.step),
            "step": state.step,
            "train_loss": mean(state.epoch_losses),
            "val_loss": evaluation.loss,
            "top1_accuracy": evaluation.top1_accuracy,
            "top5_accuracy": evaluation.top5_accuracy,
            "load_seconds": lap["load"],
            "train_seconds": lap["train"],
            "val_seconds": lap["val"],
            "lr": lr_at(state.step, self._schedule),
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
        self._console.print(
            f"epoch {record['epoch']}/{self._schedule.recipe.epochs} done  train loss {record['train_loss']:.4f}  "
            f"{evaluation.summary()}\n"
            + "".join(f"  {evaluation.weights} above, {each.weights}: {each.summary()}\n" for each in others)
            + f"  load {lap['load']:.1f} s, train {lap['train']:.1f} s, validate {lap['val']:.1f} s; "
            f"waited for data {lap.waiting_share:.1%} of the training time" + self._bottleneck(lap)
        )
        if evaluation.bad_images:
            self._console.print(f"  unreadable: {shorten(list(evaluation.bad_images))}")
        bad = (f"{name} ({reason})" for name, reason in evaluation.bad_images.items())
        self._writer.write_list(self._folder.bad_val_images, bad)

    def write_end(self, state: TrainState) -> None:
        """Where everything is, after the last step."""
        folder = self._folder
        rows = [
            (folder.weights, "the best weights"),
            (folder.evaluation, "their accuracy"),
            (folder.curves.with_suffix(".png"), "loss and accuracy, also as .svg"),
            (folder.log, "every number printed above"),
        ]
        width = max(len(str(path)) for path, _ in rows)
        price = sum(record.get("dollars", 0.0) for record in folder.records())
        self._console.print(
            f"done in {duration(time.monotonic() - self._start_seconds)}"
            + (f", {price:,.2f} dollars in all" if price else "")
            + f": best top-1 {state.best_top1_accuracy:.2%} "
            f"after epoch {self._schedule.epoch_of(state.best_step)}\n"
            + "".join(f"  {path!s:<{width}}  {what}\n" for path, what in rows)
            + f"evaluate them:  python scripts/evaluate.py --ckpt {folder.path}\n"
            f'use them:       from resnet_in1k import ResNet; model = ResNet.from_pretrained("{folder.path}")'
        )

    def stopped_message(self, stopped_by: str, step: int) -> str:
        return (
            f"stopped by {stopped_by} after step {step:,} of {self._schedule.total_steps:,}, everything is saved in "
            f"{self._folder.path}; go on with the same command and --resume"
        )

    def _lap(self) -> Lap:
        """The times since the last lap, of the process that has waited longest for data.

        In the others that wait is part of the step, in which they wait for its gradients.
        """
        mine = self.stopwatch.lap()
        names = ("load", "train", "val")
        everyone = self._accelerator.gather(
            torch.tensor([[mine[name] for name in names]], device=self._accelerator.device)
        )
        rows = everyone.tolist()
        lap = Lap(zip(names, max(rows), strict=True))  # by "load", as it comes first
        self._epoch_lap.add(lap)
        return lap

    def _write(self, record: dict[str, Any]) -> None:
        self._writer.append(record)
        self.trackers.log(record)

    def _bottleneck(self, lap: Lap) -> str:
        return f": {bottleneck(lap, self._workers)}" if lap.waiting_share > REPORTED_WAITING_SHARE else ""


def mean(values: list[float]) -> float:
    """Exactly rounded, so that it does not depend on how the values were collected."""
    return math.fsum(values) / len(values)
