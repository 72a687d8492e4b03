"""The training loop: it decides when to log, save, evaluate and stop.

A training image takes this path: data/dataset (bytes); data/decode and data/crop in a worker; data/loader (a batch on
the device); augment/pipeline with the operations that it lists; train/step; model/resnet; optim/losses.
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast

from resnet_in1k.data.decode import max_bad_images, too_many_bad_images
from resnet_in1k.data.loader import prefetch_to_device
from resnet_in1k.evaluate.evaluation import evaluate_model
from resnet_in1k.optim.lr import lr_at
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import check_resumable
from resnet_in1k.train import log, writer
from resnet_in1k.train.checkpoint import load_newest_checkpoint
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.train.plan import describe_plan, forecast
from resnet_in1k.train.preflight import check_same_program, memory_advice, preflight
from resnet_in1k.train.trainer import Trainer
from resnet_in1k.utils.console import bar_below_lines, print_line
from resnet_in1k.utils.errors import Preempted, UserError, translate_errors
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.signals import StopSignals


def train(recipe_name: str, recipe: Recipe, options: TrainOptions, command: Sequence[str] = ()) -> Path:
    """Train and return the run folder.

    Args:
        recipe_name: name of the recipe before overrides.
        command: script and flags, for recipe.json and the model card.

    Raises:
        Preempted: if SIGTERM, SIGINT, SIGUSR1 or SIGHUP stopped the run, after everything is saved.
    """
    with StopSignals() as signals, Launch.connect() as launch, translate_errors(), contextlib.ExitStack() as stack:
        check_same_program(launch, recipe, options, options.run_folder(recipe_name))
        run = Trainer(recipe_name, recipe, options, launch, signals, stack, command)
        print_line(describe_plan(run))
        if run.started_with and (note := check_resumable(run.folder, recipe, run.data_facts, run.facts)):
            print_line(note)
        try:
            out_of_memory = run.counts.per_device_batch_size, memory_advice(run.counts)
            with translate_errors(*out_of_memory, is_connected=False):
                preflight(run)
            with translate_errors(*out_of_memory):
                stop_if_requested(run, step=0, poll=0)
                if options.dry_run:
                    print_line(forecast(run))
                else:
                    start_or_resume(run)
                    training_loop(run)
        except Preempted:  # all processes raise it together, so they can wait for one another
            end(run)
            raise
        end(run)
        return run.folder.path


def training_loop(run: Trainer) -> None:
    """Train from the step after the run's state to the last: batch, step, log, save, evaluate, stop if requested."""
    counts, options, stopwatch = run.counts, run.options, run.stopwatch
    if evaluation_is_pending(run):
        evaluate(run)
    specs = run.specs(run.first_step, counts.total_steps)
    batches = prefetch_to_device(run.train_loader.batches(specs), run.device, run.augmentation.apply_to)
    with bar_below_lines(counts.total_steps, "train", done=run.state.step) as bar:
        for step in range(run.first_step, counts.total_steps + 1):
            if has_stalled(run):
                print_line(f"stopped early: {run.recipe.early_stopping_epochs} epochs without a better top-1")
                break
            with stopwatch.section("load"):
                bad_images, take = next(batches)
            with stopwatch.section("train"):
                images, targets, *drawn = take()
                loss = run.train_step(images, targets, lr_at(step, counts), step, *drawn)
                if run.average is not None:
                    run.average.update(run.train_step.model, step)
            run.uncollected_losses.append(loss)
            run.uncollected_bad_images.update(bad_images)
            bar.update()

            is_epoch_end = counts.is_last_in_epoch(step)
            if is_epoch_end or counts.steps_into_epoch(step) % options.log_every == 0:
                collect(run, step)
                log.write_steps(run, step)
            if is_epoch_end:
                save(run, step)  # before the evaluation, because the job may end during it
                evaluate(run)
            elif options.checkpoint_every and step % options.checkpoint_every == 0:
                save(run, step)
            stop_if_requested(run, step, poll=step)
    log.print_end(run)


def has_stalled(run: Trainer) -> bool:
    """True if the recipe stops early, and the last epochs that were evaluated were not better. The same on a resume."""
    patience = run.recipe.early_stopping_epochs * run.counts.steps_per_epoch
    return 0 < patience <= run.state.step - run.state.best_step


def stop_if_requested(run: Trainer, step: int, poll: int) -> None:
    """If any process has received a signal, save after `step`, the last one done, and raise Preempted on all.

    `poll` counts through the same numbers on all processes, which exchange their signals at some of them.
    """
    if stopped_by := run.signals.stop_requested(run.launch, poll):
        if run.state.step != step:  # not saved yet: state.step is the step of the newest checkpoint
            save(run, step)
        moment = f"after step {step:,} of {run.counts.total_steps:,}" if step else "before training started"
        raise Preempted(
            f"stopped by {stopped_by} {moment}, everything is saved in {run.folder.path}; resume with the same command "
            "and --resume"
        )


def collect(run: Trainer, step: int) -> None:
    """Gather the losses and bad images of all processes up to `step` into the state; raises UserError for a loss that
    is not finite, or too many bad images."""
    if run.uncollected_losses:
        losses = run.accelerator.reduce(torch.stack(run.uncollected_losses), reduction="mean").tolist()
        run.uncollected_losses.clear()
        for number, loss in enumerate(losses, start=step - len(losses) + 1):
            if not math.isfinite(loss):
                raise log.nonfinite_loss(run, number, loss)
        run.state.epoch_losses.extend(losses)
    if run.options.on_bad_image == "skip":
        collect_bad_images(run)


def collect_bad_images(run: Trainer) -> None:
    """Add the bad images that all processes have replaced to the state and to bad_images.txt."""
    state, source = run.state, run.train_source
    everyone = run.launch.gather(run.uncollected_bad_images, "collecting unreadable images")
    found = {index: reason for part in everyone for index, reason in part.items()}
    run.uncollected_bad_images.clear()
    new = sorted(found.keys() - set(state.bad_images))
    if not new:
        return
    state.bad_images = sorted([*state.bad_images, *new])
    writer.write_lines(run, run.folder.bad_images, map(source.image_name, state.bad_images))
    for index in new:
        print_line(f"replaced by the next image: {source.image_name(index)} ({found[index]})")
    if len(state.bad_images) > max_bad_images(len(source)):
        advice = f"all are listed in {run.folder.bad_images}; then train in another --output-dir"  # on other images
        raise UserError(f"{too_many_bad_images(state.bad_images, source)}; {advice}")


def save(run: Trainer, step: int) -> None:
    """Write a checkpoint, then delete those that are no longer needed."""
    collect(run, step)  # first, because it raises for a loss that is not finite, and nothing may be saved after that
    for model in run.models.values():
        broadcast(list(model.buffers()))  # each process has its own norm statistics, which training does not read
    run.state.step = step
    run.state.grad_scaler = run.train_step.scaler.state_dict() or None
    writer.write_checkpoint(run)


def evaluate(run: Trainer) -> None:
    """Evaluate at the end of an epoch, after it is saved; log; publish the weights if they are the best so far."""
    state, evaluations = run.state, {}
    with run.stopwatch.section("val"):
        for name, model in run.models.items():
            run.eval_model.load_state_dict(model.state_dict())
            evaluations[name] = evaluate_model(
                run.eval_model,
                run.eval_loader,
                run.accelerator,
                # Everything is saved: a run that stops here repeats this evaluation when it is resumed.
                stop_if_requested=lambda batches_done: stop_if_requested(run, state.step, poll=batches_done),
            )
    log.write_epoch(run, evaluations)
    state.epoch_losses.clear()
    published = evaluations[run.recipe.publish]
    is_best = published.top1_accuracy > state.best_top1_accuracy
    if is_best:
        state.best_step, state.best_top1_accuracy = state.step, published.top1_accuracy
    writer.finish_epoch(run, published, is_best)


def evaluation_is_pending(run: Trainer) -> bool:
    """True if the state is that of the end of an epoch without its evaluation."""
    return bool(run.state.epoch_losses) and run.counts.is_last_in_epoch(run.state.step)


def start_or_resume(run: Trainer) -> None:
    """Load the newest checkpoint, if there is one, and record that the run starts or is resumed."""
    state = load_newest_checkpoint(run.folder.checkpoints, run.groups, run.state.recipe_sha256)
    if state is not None:
        run.state = state
        run.train_step.scaler.load_state_dict(state.grad_scaler)
    if len(set(run.launch.gather(run.state.step, "reading the newest checkpoint"))) > 1:
        raise UserError(
            f"the processes have read different checkpoints in {run.folder.path}; it must be on storage that all "
            "machines share and can read"
        )
    run.first_step = run.state.step + 1
    if run.options.report_to:
        run.launch.on_main_process(lambda: log.start_tracker(run), "starting the tracker")
    writer.write_start(run, evaluation_is_pending(run))
    writer.write_lines(run, run.folder.bad_images, map(run.train_source.image_name, run.state.bad_images))


def end(run: Trainer) -> None:
    """Close the tracker, then wait for the other processes: a launcher ends them if one exits early."""
    with log.tracker_errors(run):
        for tracker in run.accelerator.trackers:
            tracker.finish()
    run.accelerator.trackers = []
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
