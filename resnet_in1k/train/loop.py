"""Training a run from its first or its resumed step to its last."""

import contextlib
import dataclasses
from pathlib import Path

from resnet_in1k.data.loader import prefetch_to_device
from resnet_in1k.evaluate.evaluation import evaluate_model
from resnet_in1k.optim.lr import lr_at
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.train.checkpoint import load_newest_checkpoint
from resnet_in1k.train.forecast import forecast
from resnet_in1k.train.guard import out_of_memory_message
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.train.plan import describe_plan
from resnet_in1k.train.preflight import preflight
from resnet_in1k.train.resume import check_resumable
from resnet_in1k.train.trainer import Trainer
from resnet_in1k.utils.device import is_out_of_memory
from resnet_in1k.utils.distributed import Launch, broadcast_buffers, translate_process_errors
from resnet_in1k.utils.errors import Preempted, ProcessError, UserError
from resnet_in1k.utils.pool import translate_worker_errors
from resnet_in1k.utils.signals import StopSignals


def train(recipe_name: str, recipe: Recipe, options: TrainOptions) -> Path:
    """Train by `recipe`, known as `recipe_name` before any overrides, and return the run folder.

    Raises:
        UserError: for anything wrong with recipe, data, machine or output folder that a user can fix.
        Preempted: if SIGTERM, SIGINT or SIGUSR1 stopped it, once everything is saved.
    """
    run = None
    with (
        StopSignals() as signals,
        translate_worker_errors(),
        translate_process_errors(),
        Launch.connect() as launch,
        contextlib.ExitStack() as stack,
    ):
        signals.agree_within(launch)
        try:
            run = Trainer(recipe_name, recipe, options, launch, signals, stack)
            run.console.print(describe_plan(run))
            check_can_start(run)
            preflight(run)
            if stopped_by := signals.agreed(0):
                raise Preempted(
                    f"stopped by {stopped_by} before the first step; start with the same command and --resume"
                )
            if options.dry_run:
                run.console.print(forecast(run))
            else:
                start_or_resume(run)
                training_loop(run)
        except Preempted:
            run.end()
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ProcessError(out_of_memory_message(error, run and run.schedule)) from None
        run.end()
        return run.folder.path


def training_loop(run: Trainer) -> None:
    """Train from the step after the run's state to the last: batch, step, log, save, evaluate, stop if asked to."""
    schedule, state, log, options = run.schedule, run.state, run.log, run.options
    first_step = state.step + 1
    order = run.train_order(first_step, schedule.total_steps)
    log.start()
    if evaluation_is_pending(run):
        evaluate(run)
    batches = prefetch_to_device(run.train_loader.batches(order), run.device, run.augmentation.prepare)
    with run.console.bar(schedule.total_steps, "train", done=state.step) as bar:
        for step in range(first_step, schedule.total_steps + 1):
            with log.stopwatch.section("load"):
                batch = next(batches)
            with log.stopwatch.section("train"):
                loss = run.train_step(*batch.tensors(), lr_at(step, schedule), step)
                if run.average is not None:
                    run.average.update(run.train_step.model, step)
            log.add(loss)
            run.skipped.add(batch.bad_images)
            bar.update()

            if log.is_due(step):
                collect(run, step)
                log.write_steps(step, state)
            if schedule.is_last_in_epoch(step):
                save(run, step)  # first, as a job's time may be over before its validation is
                evaluate(run)
            elif options.checkpoint_every and step % options.checkpoint_every == 0:
                save(run, step)
            if stopped_by := run.signals.agreed(step):
                if state.step != step:
                    save(run, step)
                raise Preempted(log.stopped_message(stopped_by, step))
    log.write_end(state)


def collect(run: Trainer, step: int) -> None:
    """Bring the losses and bad images up to `step` from all processes to the state."""
    run.log.collect_losses(step, run.state, run.train_source)
    if run.options.on_bad_image == "skip":
        run.skipped.collect(run.state)


def save(run: Trainer, step: int) -> None:
    """Write a checkpoint, then delete those that are no longer needed."""
    collect(run, step)
    for model in run.models.values():
        broadcast_buffers(model, run.accelerator)
    run.state.step = step
    run.state.grad_scaler = run.train_step.scaler_state()
    run.writer.save_checkpoint(run.state, run.groups)


def evaluate(run: Trainer) -> None:
    """At an epoch's end, once it is saved: evaluate, log, publish the weights if they are the best so far."""
    state, evaluations = run.state, []

    def stop_if_requested(batches_done: int) -> None:
        if stopped_by := run.signals.agreed(batches_done):  # everything is saved: a resumed run evaluates first
            raise Preempted(run.log.stopped_message(stopped_by, state.step))

    with run.log.stopwatch.section("val"):
        for name, model in run.models.items():
            broadcast_buffers(model, run.accelerator)
            run.eval_model.load_state_dict(model.state_dict())
            evaluation = evaluate_model(
                run.eval_model, run.val_source, run.eval_loader, run.accelerator, run.preprocessing, stop_if_requested
            )
            evaluations.append(dataclasses.replace(evaluation, weights=name))
    run.log.write_epoch(state, evaluations)
    state.epoch_losses.clear()
    title = f"{run.recipe.model} on {run.train_source.name}, recipe {run.recipe_name}"
    run.writer.finish_epoch(state, evaluations[-1], run.eval_model, title)


def evaluation_is_pending(run: Trainer) -> bool:
    """Whether the state is that of an epoch's end without its evaluation."""
    return bool(run.state.epoch_losses) and run.schedule.is_last_in_epoch(run.state.step)


def check_can_start(run: Trainer) -> None:
    """Raises UserError if there is a run that was started with other settings."""
    if run.folder.recipe.exists() and (note := check_resumable(run.folder, run.recipe, run.data, run.facts)):
        run.console.print(note)
    run.launch.gather(None, "looks at the run folder")  # before the main process writes what they look for


def start_or_resume(run: Trainer) -> None:
    """Load the newest checkpoint, if there is one, and write that the run starts or goes on.

    Raises:
        UserError: if there are checkpoints, but none that can be used.
    """
    state = load_newest_checkpoint(run.folder.checkpoints, run.groups, run.console.print, run.state.recipe_sha256)
    if state is not None:
        run.state = state
        run.train_step.load_scaler_state(state.grad_scaler)
    if len(set(run.launch.gather(run.state.step, "reads the newest checkpoint"))) > 1:
        raise UserError(
            f"the processes have read different checkpoints in {run.folder.path}; it must be on storage that all "
            "machines share and can read"
        )
    if run.options.report_to:
        project, config = run.folder.path.name, dataclasses.asdict(run.recipe)
        run.log.trackers.start(run.launch, run.folder.tracker, project, config, first_step=run.state.step + 1)
    run.writer.start(
        run.state,
        run.recipe_name,
        run.recipe,
        run.data,
        run.facts,
        evaluation_pending=evaluation_is_pending(run),
    )
    run.skipped.write_list(run.state)
