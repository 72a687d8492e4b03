"""Where recipe, data, model and machine meet: the training loop and what it leaves in the run folder."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object

from resnet_in1k.augment import augment, draw
from resnet_in1k.checkpoint import TrainState, load_newest_checkpoint
from resnet_in1k.console import Console
from resnet_in1k.devices import (
    Precision,
    choose_cpu_threads,
    choose_workers,
    hardware_name,
    is_out_of_memory,
    lost_processes_explained,
    make_accelerator,
    share_buffers,
)
from resnet_in1k.errors import Preempted, ProcessError, UserError, first_line
from resnet_in1k.evaluation import EVAL_BATCH_SIZE, evaluate_model
from resnet_in1k.model import ResNet
from resnet_in1k.optim import lr_at
from resnet_in1k.pace import Pace
from resnet_in1k.pipeline import (
    Batch,
    OnBadImage,
    Take,
    TrainOrder,
    most_bad_images,
    on_device,
    too_many_bad_images,
    train_loader,
    worker_deaths_explained,
)
from resnet_in1k.plan import Plan, describe
from resnet_in1k.preemption import Preemption
from resnet_in1k.preflight import check_disk, check_images, check_workers, classes_told, rehearse
from resnet_in1k.recipes import RECIPES, Recipe
from resnet_in1k.run_folder import RunFolder, describe_data
from resnet_in1k.run_writer import NOTHING_BEGUN, RunWriter
from resnet_in1k.session import check_resumable, precision_of, session_facts
from resnet_in1k.sources import open_train_and_val, some
from resnet_in1k.step import TrainStep
from resnet_in1k.stopwatch import WAITING_SHARE_WORTH_SAYING, Lap, Stopwatch, diagnose


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How and where to run; nothing here changes what is computed, but for rounding."""

    data: str = "data/imagenet"
    """A folder with train/<class>/* and val/<class>/*, or `digits`, or `synthetic`."""
    output_dir: Path | None = None
    """Run folder; by default runs/<recipe>. One that already holds a run is refused unless --resume."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder; start if there is none."""
    workers: int | None = None
    """Loader workers per process; by default from the number of CPU cores."""
    log_every: int = 100
    """Optimizer steps between two lines of the log; an epoch's last step has one too."""
    checkpoint_every: int = 0
    """Optimizer steps between two checkpoints, besides each epoch's end; 0 for epochs' ends only."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, besides the best."""
    report_to: str | None = None
    """An Accelerate tracker to report to as well, such as tensorboard or wandb."""
    dry_run: bool = False
    """Print the plan, run the preflight, stop."""
    on_bad_image: OnBadImage = "fail"
    """At a training image that cannot be read: fail, or skip to the next one, for at most 0.1 % of them."""
    precision: Precision = "auto"
    """Training precision; auto: as launched, and where the launch says nothing bf16 if the device is fast at it."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step and process, for less memory: the global batch stays as it is."""
    compile: bool = False
    """Compile the model by torch.compile: slower to start; meant for GPUs, where it has not been measured yet."""
    cpu_threads: int | None = None
    """Threads for computing on the CPU, per process; by default, if it trains, all physical cores, shared out."""

    def __post_init__(self) -> None:
        for name, least in [("log_every", 1), ("checkpoint_every", 0), ("keep_checkpoints", 1)]:
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least}")


def train(recipe_name: str, recipe: Recipe, options: TrainOptions) -> Path:
    """Train by `recipe`, known as `recipe_name` before any overrides, and return the run folder.

    Raises:
        UserError: for anything wrong with recipe, data, machine or output folder that a person can mend.
        Preempted: if SIGTERM, SIGINT or SIGUSR1 stopped it, once everything is saved.
    """
    trainer = None
    with Preemption() as preemption, worker_deaths_explained(), lost_processes_explained():
        try:
            trainer = Trainer(recipe_name, recipe, options, preemption)
            trainer.announce()
            trainer.preflight()
            if not options.dry_run:
                trainer.start_or_resume()
                trainer.run()
        except Preempted:
            trainer.end()
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ProcessError(out_of_memory(error, trainer and trainer.plan)) from None
        trainer.end()
        return trainer.folder.path


def out_of_memory(error: RuntimeError, plan: Plan | None) -> str:
    """What to do about it; without a plan it came before the first step."""
    reason = first_line(error)
    if plan is None:
        return f"out of memory before the first step ({reason}); does something else use this device?"
    more = plan.more_accumulation_steps
    if more is None:
        return f"out of memory with 1 image in a forward pass ({reason}); take a smaller --image-size"
    return (
        f"out of memory with {plan.per_device_batch_size} images in a forward pass ({reason}); "
        f"--gradient-accumulation-steps {more} makes it {plan.per_process_batch_size // more} and leaves the "
        f"global batch of {plan.recipe.global_batch_size} as it is; what was saved is intact, go on with --resume"
    )


class Trainer:
    """The parts of one run, and the steps of its loop."""

    def __init__(self, recipe_name: str, recipe: Recipe, options: TrainOptions, preemption: Preemption):
        self.recipe_name, self.recipe, self.options = recipe_name, recipe, options
        self.folder = RunFolder(options.output_dir or Path("runs", recipe_name))
        self.folder.check_free(options.resume)
        self.train_source, self.val_source = open_train_and_val(options.data)

        self.accelerator = make_accelerator(
            precision_of(self.folder, options.precision), options.report_to, self.folder.path
        )
        self.device = self.accelerator.device
        self.preemption = preemption
        self.preemption.agree_with_others(self.accelerator)
        self.console = Console(self.accelerator.is_main_process)
        self.writer = RunWriter(self.folder, self.accelerator, options.keep_checkpoints, self.console.say)
        self.cpu_threads = choose_cpu_threads(self.device, options.cpu_threads)
        self.workers = choose_workers(self.device, options.workers)
        self.plan = Plan(
            recipe=recipe,
            num_processes=self.accelerator.num_processes,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            num_train_images=len(self.train_source),
        )

        num_classes = len(self.train_source.class_names)
        self.train_step = TrainStep(
            recipe,
            num_classes,
            self.accelerator,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            compile=options.compile,
        )
        self.model, self.optimizer = self.train_step.model, self.train_step.optimizer
        # A second, plain model evaluates: it is given the very weights that are saved, and knows nothing of DDP or
        # mixed precision.
        eval_model = ResNet(recipe.model, num_classes).requires_grad_(False)
        self.eval_model = eval_model.to(self.device, memory_format=torch.channels_last)

        self.state = TrainState(recipe_sha256=recipe.fingerprint())
        self.resumed_step = 0
        self.uncollected_losses: list[torch.Tensor] = []
        self.bad_images: dict[int, str] = {}
        """Met by this process since they were last collected from all, with the decoder's reasons."""
        self.stopwatch = Stopwatch(self.device)
        self.epoch_lap = Lap()

    def end(self) -> None:
        """Once the trackers are done, as a launcher would end this process if another had left before it."""
        self.writer.finish_trackers()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def announce(self) -> None:
        self.console.say(
            describe(
                self.plan,
                recipe_name=self.recipe_name,
                named_recipe=RECIPES.get(self.recipe_name, self.recipe),
                train=self.train_source,
                val=self.val_source,
                device=hardware_name(self.device) + (" (no GPU is used)" if self.device.type == "cpu" else ""),
                mixed_precision=self.accelerator.mixed_precision,
                workers=self.workers,
                cpu_threads=self.cpu_threads,
            )
        )

    def preflight(self) -> None:
        """Fail now and not in an hour. From here on the run folder is this run's, unless it is a dry run."""
        self.data = describe_data(self.train_source, self.val_source)
        self.session = session_facts(
            self.plan, self.accelerator.mixed_precision, hardware_name(self.device), self.cpu_threads
        )
        if self.folder.recipe.exists() and (note := check_resumable(self.folder, self.recipe, self.data, self.session)):
            self.console.say(note)
        self.accelerator.wait_for_everyone()  # before the main process writes what the others have just looked for
        told = {"classes": classes_told(self.train_source, self.val_source)}

        def check_surroundings() -> None:
            sources = (self.train_source, self.val_source)
            told["images"] = "; ".join(check_images(source, self.options.on_bad_image) for source in sources)
            told["disk"] = check_disk(
                self.folder.nearest_existing(), self.folder.checkpoints, self.model, self.options.keep_checkpoints
            )
            told["workers"] = check_workers(
                self.workers, self.plan.per_process_batch_size + EVAL_BATCH_SIZE, self.recipe.image_size
            )

        self.writer.on_main_process(check_surroundings, NOTHING_BEGUN)
        if not self.options.dry_run:
            self.writer.take_possession()
        told["step"], told["checkpoint"] = rehearse(
            self.train_step,
            self.eval_model,
            self.plan,
            self.device,
            self.folder.nearest_existing(),
            lambda check: self.writer.on_main_process(check, NOTHING_BEGUN),
        )
        self.console.say("\n".join(["preflight", *(f"  {name:<14}{text}" for name, text in told.items())]))
        if stopped_by := self.preemption.agreed(0):
            raise Preempted(f"stopped by {stopped_by} before the first step; start with the same command and --resume")

    def start_or_resume(self) -> None:
        """Raises UserError if there are checkpoints, but none that can be used."""
        state = load_newest_checkpoint(
            self.folder.checkpoints, self.model, self.optimizer, self.console.say, self.state.recipe_sha256
        )
        if state is not None:
            self.state, self.resumed_step = state, state.step
            self.train_step.load_scaler_state(state.grad_scaler)
        if len(set(gather_object([self.state.step]))) > 1:
            raise UserError(
                f"the processes have read different checkpoints in {self.folder.path}; it must lie on storage that all "
                "machines share and can read"
            )
        if self.options.report_to:
            self.writer.start_trackers(dataclasses.asdict(self.recipe))
        self.writer.begin(
            self.state,
            self.recipe_name,
            self.recipe,
            self.data,
            self.session,
            verdict_pending=self._verdict_is_pending(),
        )
        self._list_bad_images()

    def _list_bad_images(self) -> None:
        names = [self.train_source.image_name(index) for index in self.state.bad_images]
        self.writer.write_list(self.folder.bad_images, names)

    def run(self) -> None:
        begun_seconds = time.monotonic()
        steps_per_epoch, first_step = self.plan.steps_per_epoch, self.state.step + 1
        batches, pace = self._batches(first_step), Pace(self.plan, self.device, self.console, first_step)
        if self._verdict_is_pending():
            self._finish_epoch(self.state.step)
        with self.console.bar(self.plan.total_steps, "train", done=self.state.step) as bar:
            for step in range(first_step, self.plan.total_steps + 1):
                with self.stopwatch.section("load"):
                    take = next(batches)
                with self.stopwatch.section("train"):
                    images, labels = take()
                    loss = self.train_step(images, labels, lr_at(step, self.recipe, steps_per_epoch))
                    self.uncollected_losses.append(loss)
                bar.update()
                pace.step_done(step)

                step_in_epoch = (step - 1) % steps_per_epoch + 1
                if step_in_epoch % self.options.log_every == 0 or step_in_epoch == steps_per_epoch:
                    self._log_steps(step, step_in_epoch)
                if step_in_epoch == steps_per_epoch:
                    with pace.paused():
                        self._save(step)  # first, as a job's time may be over before its validation is
                        self._finish_epoch(step)
                elif self.options.checkpoint_every and step % self.options.checkpoint_every == 0:
                    with pace.paused():
                        self._save(step)
                if stopped_by := self.preemption.agreed(step):
                    if self.state.step != step:
                        self._save(step)
                    raise Preempted(self._farewell(stopped_by))
        self._say_goodbye(time.monotonic() - begun_seconds)

    def _batches(self, first_step: int) -> Iterator[Take]:
        """This process's augmented batches, (B, 3, S, S) float32 and (B,) int64, on the device."""
        rank, size = self.accelerator.process_index, self.plan.per_process_batch_size
        mine = slice(rank * size, (rank + 1) * size)
        steps = itertools.count(first_step)

        def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
            self.bad_images.update(batch.bad_images)
            return augment(batch.images, draw(self.recipe, next(steps))[mine]), batch.labels

        loader = train_loader(
            self.train_source,
            self.recipe,
            first_step=first_step,
            last_step=self.plan.total_steps,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            rank=rank,
            world_size=self.plan.num_processes,
            on_bad_image=self.options.on_bad_image,
        )
        return on_device(loader, self.device, prepare)

    def _collect_losses(self, step: int) -> None:
        """Bring the losses up to `step`, averaged over all processes, to the host: a synchronisation.

        Raises:
            UserError: if one is not finite; no weights have changed since.
        """
        if not self.uncollected_losses:
            return
        first_step = step - len(self.uncollected_losses) + 1
        losses = self.accelerator.reduce(torch.stack(self.uncollected_losses), reduction="mean").tolist()
        self.uncollected_losses.clear()
        for number, loss in enumerate(losses, start=first_step):
            if not math.isfinite(loss):
                self._give_up(number, loss)
        self.state.epoch_losses.extend(losses)
        if self.options.on_bad_image == "skip":
            self._collect_bad_images()

    def _collect_bad_images(self) -> None:
        """Raises UserError if all processes together have met too many."""
        found = {index: reason for part in gather_object([self.bad_images]) for index, reason in part.items()}
        self.bad_images.clear()
        new = sorted(found.keys() - set(self.state.bad_images))
        if not new:
            return
        self.state.bad_images = sorted([*self.state.bad_images, *new])
        self._list_bad_images()
        for index in new:
            self.console.say(f"replaced by the next: {self.train_source.image_name(index)} ({found[index]})")
        if len(self.state.bad_images) > most_bad_images(len(self.train_source)):
            raise UserError(
                f"{too_many_bad_images(self.state.bad_images, self.train_source)}; they are listed in "
                f"{self.folder.bad_images}"
            )

    def _give_up(self, step: int, loss: float) -> None:
        listed = self.folder.path / "nonfinite_batch.txt"
        order = TrainOrder(
            num_images=len(self.train_source),
            global_batch_size=self.recipe.global_batch_size,
            seed=self.recipe.seed,
            first_step=step,
            last_step=step,
        )
        names = [self.train_source.image_name(index) for batch in order for _, index in batch]
        self.writer.write_list(listed, names)
        raise UserError(
            f"the loss of step {step:,} (epoch {self._epoch_of(step)}, lr "
            f"{lr_at(step, self.recipe, self.plan.steps_per_epoch):g}) is {loss}; the weights were not touched and the "
            f"checkpoints before it stay; its images are listed in {listed}; try a lower --lr, longer --warmup-epochs, "
            "or --precision fp32, in another --output-dir"
        )

    def _log_steps(self, step: int, step_in_epoch: int) -> None:
        self._collect_losses(step)
        lap = self.stopwatch.lap()
        self.epoch_lap.add(lap)
        num_steps = (
            step_in_epoch - 1
        ) % self.options.log_every + 1  # since the last line; the epoch's end may come early
        measured_steps = min(num_steps, step - self.resumed_step)
        record = {
            "kind": "train",
            "epoch": self._epoch_of(step),
            "step": step,
            "loss": mean(self.state.epoch_losses[-num_steps:]),
            "lr": lr_at(step, self.recipe, self.plan.steps_per_epoch),
            "images_per_second": measured_steps * self.recipe.global_batch_size / (lap["load"] + lap["train"]),
            "load_seconds": lap["load"] / measured_steps,
            "train_seconds": lap["train"] / measured_steps,
        }
        self.writer.record(record)
        self.console.say(
            f"epoch {record['epoch']}/{self.recipe.epochs}  step {step:,}/{self.plan.total_steps:,}  "
            f"loss {record['loss']:.4f}  lr {record['lr']:.3g}  {record['images_per_second']:,.0f} images/s  "
            f"a batch: load {record['load_seconds'] * 1000:.1f} ms, train {record['train_seconds'] * 1000:.1f} ms"
            + self._diagnosis(lap)
        )

    def _diagnosis(self, lap: Lap) -> str:
        """What to do about waiting for data, if it is worth saying."""
        return f": {diagnose(lap, self.workers)}" if lap.waiting_share > WAITING_SHARE_WORTH_SAYING else ""

    def _finish_epoch(self, step: int) -> None:
        """Evaluate, log, keep the weights if they are the best so far, draw the curves."""
        share_buffers(self.model, self.accelerator)
        self.eval_model.load_state_dict(self.model.state_dict())
        with self.stopwatch.section("val"):
            evaluation = evaluate_model(
                self.eval_model,
                self.val_source,
                self.accelerator,
                image_size=self.recipe.image_size,
                resize_size=self.recipe.eval_resize_size,
                num_workers=self.workers,
                stop_asked=self.preemption.agreed,
            )
        if isinstance(evaluation, str):  # saved with this epoch's losses: a resumed run evaluates first
            raise Preempted(self._farewell(evaluation))
        self.epoch_lap.add(self.stopwatch.lap())
        lap, self.epoch_lap = self.epoch_lap, Lap()
        record = {
            "kind": "epoch",
            "epoch": self._epoch_of(step),
            "step": step,
            "train_loss": mean(self.state.epoch_losses),
            "val_loss": evaluation.loss,
            "top1_accuracy": evaluation.top1_accuracy,
            "top5_accuracy": evaluation.top5_accuracy,
            "load_seconds": lap["load"],
            "train_seconds": lap["train"],
            "val_seconds": lap["val"],
            "lr": lr_at(step, self.recipe, self.plan.steps_per_epoch),
        }
        self.writer.record(record)
        self.console.say(
            f"epoch {record['epoch']}/{self.recipe.epochs} done  train loss {record['train_loss']:.4f}  "
            f"{evaluation.summary()}\n"
            f"  load {lap['load']:.1f} s, train {lap['train']:.1f} s, validate {lap['val']:.1f} s; "
            f"waited for data {lap.waiting_share:.1%} of the training time" + self._diagnosis(lap)
        )

        if evaluation.bad_images:
            self.console.say(f"  unreadable: {some(list(evaluation.bad_images))}")
        bad = (f"{name} ({reason})" for name, reason in evaluation.bad_images.items())
        self.writer.write_list(self.folder.bad_val_images, bad)
        self.state.epoch_losses.clear()
        title = f"{self.recipe.model} on {self.train_source.name}, recipe {self.recipe_name}"
        self.writer.finish_epoch(self.state, evaluation, self.eval_model, title)

    def _verdict_is_pending(self) -> bool:
        """Whether the state is that of an epoch's end without its evaluation."""
        return bool(self.state.epoch_losses) and self.state.step % self.plan.steps_per_epoch == 0

    def _save(self, step: int) -> None:
        """Write a checkpoint, then delete those that are no longer needed."""
        self._collect_losses(step)
        share_buffers(self.model, self.accelerator)
        self.state.step = step
        self.state.grad_scaler = self.train_step.scaler_state()
        self.writer.save_checkpoint(self.state, self.model, self.optimizer)

    def _epoch_of(self, step: int) -> int:
        return (step - 1) // self.plan.steps_per_epoch + 1

    def _farewell(self, stopped_by: str) -> str:
        return (
            f"stopped by {stopped_by} after step {self.state.step:,} of {self.plan.total_steps:,}, all is saved in "
            f"{self.folder.path}; go on with the same command and --resume"
        )

    def _say_goodbye(self, elapsed_seconds: float) -> None:
        folder = self.folder
        rows = [
            (folder.weights, "the best weights"),
            (folder.evaluation, "how good they are"),
            (folder.curves.with_suffix(".png"), "loss and accuracy, also as .svg"),
            (folder.log, "every number printed above"),
        ]
        width = max(len(str(path)) for path, _ in rows)
        self.console.say(
            f"done in {elapsed_seconds:.0f} s: best top-1 {self.state.best_top1_accuracy:.2%} "
            f"after epoch {self._epoch_of(self.state.best_step)}\n"
            + "".join(f"  {path!s:<{width}}  {what}\n" for path, what in rows)
            + f"evaluate them:  python scripts/evaluate.py --ckpt {folder.path}\n"
            f'use them:       from resnet_in1k import ResNet; model = ResNet.from_pretrained("{folder.path}")'
        )


def mean(values: list[float]) -> float:
    """Exactly rounded, so that it does not depend on how the values were collected."""
    return math.fsum(values) / len(values)
