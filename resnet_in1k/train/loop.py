"""The training loop: it decides when to log, save, evaluate and stop.

A training image takes this path: data/dataset (bytes); data/decode and data/crop in a worker; data/loader (a batch on
the device); augment/pipeline with augment/operations; train/step; model/resnet; optim/losses.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from resnet_in1k.data.decode import max_bad_images, too_many_bad_images
from resnet_in1k.data.loader import prefetch_to_device
from resnet_in1k.data.sampler import train_specs
from resnet_in1k.evaluate.evaluation import evaluate_model
from resnet_in1k.optim.lr import lr_at
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import check_resumable
from resnet_in1k.train.checkpoint import load_newest_checkpoint
from resnet_in1k.train.plan import describe_plan, forecast
from resnet_in1k.train.preflight import check_same_program, out_of_memory_message, preflight
from resnet_in1k.train.trainer import Trainer, TrainOptions
from resnet_in1k.utils.console import bar_below_lines, print_line
from resnet_in1k.utils.distributed import broadcast_buffers
from resnet_in1k.utils.errors import Preempted, ProcessError, UserError, is_out_of_memory, translate_errors
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.signals import StopSignals


def train(recipe_name: str, recipe: Recipe, options: TrainOptions, command: Sequence[str] = ()) -> Path:
    """Train and return the run folder.

    Args:
        recipe_name: name of the recipe before overrides.
        command: script and flags, for recipe.json and the model card.

    Raises:
        UserError: for anything wrong with recipe, data, machine or output folder that a user can fix.
        Preempted: if SIGTERM, SIGINT or SIGUSR1 stopped the run, after everything is saved.
    """
    run = None
    with StopSignals() as signals, Launch.connect() as launch, translate_errors(), contextlib.ExitStack() as stack:
        try:
            check_same_program(launch, recipe, options, options.run_folder(recipe_name))
            run = Trainer(recipe_name, recipe, options, launch, signals, stack, command)
            print_line(describe_plan(run))
            if run.folder.recipe.exists() and (note := check_resumable(run.folder, recipe, run.data_facts, run.facts)):
                print_line(note)
            preflight(run)
            stop_if_requested(run, step=0, poll=0)
            if options.dry_run:
                print_line(forecast(run))
            else:
                start_or_resume(run)
                training_loop(run)
        except Preempted:  # all processes raise it together, so they can wait for one another
            run.end()
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ProcessError(out_of_memory_message(error, run.counts if run else None)) from None
        run.end()
        return run.folder.path


def training_loop(run: Trainer) -> None:
    """Train from the step after the run's state to the last: batch, step, log, save, evaluate, stop if requested."""
    counts, state, log, options = run.counts, run.state, run.log, run.options
    first_step = state.step + 1
    if evaluation_is_pending(run):
        evaluate(run)
    specs = run.specs(first_step, counts.total_steps)
    batches = prefetch_to_device(run.train_loader.batches(specs), run.device, run.augmentation.apply_to)
    with bar_below_lines(counts.total_steps, "train", done=state.step) as bar:
        for step in range(first_step, counts.total_steps + 1):
            with log.stopwatch.section("load"):
                bad_images, take = next(batches)
            with log.stopwatch.section("train"):
                images, targets = take()
                loss = run.train_step(images, targets, lr_at(step, counts), step)
                if run.average is not None:
                    run.average.update(run.train_step.model, step)
            log.add(loss)
            run.uncollected_bad_images.update(bad_images)
            bar.update()

            is_epoch_end = counts.is_last_in_epoch(step)
            if is_epoch_end or counts.steps_into_epoch(step) % options.log_every == 0:
                collect(run, step)
                log.write_steps(state, step)
            if is_epoch_end:
                save(run, step)  # before the evaluation, because the job may end during it
                evaluate(run)
            elif options.checkpoint_every and step % options.checkpoint_every == 0:
                save(run, step)
            stop_if_requested(run, step, poll=step)
    log.write_end(state)


def stop_if_requested(run: Trainer, step: int, poll: int) -> None:
    """If any process has received a signal, save after `step`, the last one done, and raise Preempted on all.

    `poll` counts through the same numbers on all processes, which exchange their signals at some of them.
    """
    if stopped_by := run.signals.stop_requested(run.launch, poll):
        if run.state.step != step:  # not saved yet: state.step is the step of the newest checkpoint
            save(run, step)
        raise Preempted(run.log.stopped_message(stopped_by, step))


def collect(run: Trainer, step: int) -> None:
    """Gather the losses and bad images of all processes up to `step` into the state.

    Raises:
        UserError: if a loss is not finite, or too many images are bad.
    """
    losses = run.log.collect_losses()
    for number, loss in enumerate(losses, start=step - len(losses) + 1):
        if not math.isfinite(loss):
            # The batch of one process without accumulation is the global batch.
            counts = StepCounts(run.recipe, 1, 1, len(run.train_source))
            (spec,) = train_specs(counts, number, number, 0, run.train_source.labels, run.shard_of)
            names = [run.train_source.image_name(sample.index) for sample in spec.samples]
            raise run.log.write_nonfinite_loss(number, loss, names)
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
    run.writer.write_list(run.folder.bad_images, [source.image_name(index) for index in state.bad_images])
    for index in new:
        print_line(f"replaced by the next image: {source.image_name(index)} ({found[index]})")
    if len(state.bad_images) > max_bad_images(len(source)):
        raise UserError(f"{too_many_bad_images(state.bad_images, source)}; see {run.folder.bad_images}")


def save(run: Trainer, step: int) -> None:
    """Write a checkpoint, then delete those that are no longer needed."""
    collect(run, step)  # first, because it raises for a loss that is not finite, and nothing may be saved after that
    for model in run.models.values():
        broadcast_buffers(model, run.accelerator)
    run.state.step = step
    run.state.grad_scaler = run.train_step.scaler_state()
    run.writer.save_checkpoint(run.state, run.groups)


def evaluate(run: Trainer) -> None:
    """Evaluate at the end of an epoch, after it is saved; log; publish the weights if they are the best so far."""
    state, evaluations = run.state, []
    with run.log.stopwatch.section("val"):
        for name, model in run.models.items():
            broadcast_buffers(model, run.accelerator)
            run.eval_model.load_state_dict(model.state_dict())
            evaluation = evaluate_model(
                run.eval_model,
                run.val_source,
                run.eval_loader,
                run.accelerator,
                run.preprocessing,
                # Everything is saved: a run that stops here repeats this evaluation when it is resumed.
                stop_if_requested=lambda batches_done: stop_if_requested(run, state.step, poll=batches_done),
            )
            evaluations.append(dataclasses.replace(evaluation, weights=name))
    run.log.write_epoch(state, evaluations)
    state.epoch_losses.clear()
    published = next(each for each in evaluations if each.weights == run.recipe.publish)
    is_best = published.top1_accuracy > state.best_top1_accuracy
    if is_best:
        state.best_step, state.best_top1_accuracy = state.step, published.top1_accuracy
    title = f"{run.recipe.model} on {run.train_source.name}, recipe {run.recipe_name}"
    run.writer.finish_epoch(state, published, run.models[published.weights], title, is_best)


def evaluation_is_pending(run: Trainer) -> bool:
    """True if the state is that of the end of an epoch without its evaluation."""
    return bool(run.state.epoch_losses) and run.counts.is_last_in_epoch(run.state.step)


def start_or_resume(run: Trainer) -> None:
    """Load the newest checkpoint, if there is one, and record that the run starts or is resumed.

    Raises:
        UserError: if there are checkpoints, but none can be used.
    """
    state = load_newest_checkpoint(run.folder.checkpoints, run.groups, print_line, run.state.recipe_sha256)
    if state is not None:
        run.state = state
        run.train_step.load_scaler_state(state.grad_scaler)
    if len(set(run.launch.gather(run.state.step, "reading the newest checkpoint"))) > 1:
        raise UserError(
            f"the processes have read different checkpoints in {run.folder.path}; it must be on storage that all "
            "machines share and can read"
        )
    if run.options.report_to:
        project, config = run.folder.path.name, dataclasses.asdict(run.recipe)
        run.log.trackers.start(run.launch, run.folder.tracker, project, config, first_step=run.state.step + 1)
    pending = evaluation_is_pending(run)
    run.writer.start(run.state, run.recipe_name, run.recipe, run.data_facts, run.facts, evaluation_pending=pending)
    names = [run.train_source.image_name(index) for index in run.state.bad_images]
    run.writer.write_list(run.folder.bad_images, names)
