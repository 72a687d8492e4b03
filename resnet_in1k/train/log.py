"""The log of a training run: records in log.jsonl and for a tracker, and lines on the terminal."""

import contextlib
import json
import secrets
import shlex
import time
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from resnet_in1k.data.sampler import train_specs
from resnet_in1k.evaluate.evaluation import Evaluation
from resnet_in1k.optim.lr import lr_at
from resnet_in1k.recipes.recipe import PublishedWeights
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train.trainer import Trainer
from resnet_in1k.train.writer import write_lines
from resnet_in1k.utils import files
from resnet_in1k.utils.console import print_line
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import duration, first_line, shorten
from resnet_in1k.utils.launch import SAVED_IS_INTACT
from resnet_in1k.utils.process import program
from resnet_in1k.utils.timing import Lap, bottleneck, waiting_share


def write_steps(run: Trainer, step: int) -> None:
    """Write the record of the steps since the last one, after their losses were collected."""
    lap, counts = _lap(run), run.counts
    num_steps = (counts.steps_into_epoch(step) - 1) % run.options.log_every + 1
    measured_steps = min(num_steps, step - run.first_step + 1)  # fewer, if the run was resumed in between
    record = {
        "kind": "train",
        "epoch": counts.epoch_of(step),
        "step": step,
        "loss": fmean(run.state.epoch_losses[-num_steps:]),
        "lr": lr_at(step, counts),
        "images_per_second": measured_steps * run.recipe.global_batch_size / (lap["load"] + lap["train"]),
        "load_seconds": lap["load"] / measured_steps,
        "train_seconds": lap["train"] / measured_steps,
    }
    _write(run, record)
    left_seconds = (counts.total_steps - step) * (record["load_seconds"] + record["train_seconds"])
    print_line(
        f"epoch {record['epoch']}/{run.recipe.epochs}  step {step:,}/{counts.total_steps:,}  "
        f"loss {record['loss']:.4f}  lr {record['lr']:.3g}  {record['images_per_second']:,.0f} images/s  "
        f"a batch: load {record['load_seconds'] * 1000:.1f} ms, train {record['train_seconds'] * 1000:.1f} ms  "
        f"{duration(left_seconds)} of training left{_bottleneck(run, lap)}"
    )


def write_epoch(run: Trainer, evaluations: dict[PublishedWeights, Evaluation]) -> None:
    """Write the record of the epoch that ends with the state's step."""
    state, recipe = run.state, run.recipe
    evaluation = evaluations[recipe.publish]
    others = {name: each for name, each in evaluations.items() if name != recipe.publish}
    _lap(run)
    lap, run.epoch_lap = run.epoch_lap, Lap()
    record = {
        "kind": "epoch",
        "epoch": run.counts.epoch_of(state.step),
        "step": state.step,
        "train_loss": fmean(state.epoch_losses),
        "val_loss": evaluation.loss,
        "top1_accuracy": evaluation.top1_accuracy,
        "top5_accuracy": evaluation.counts["top5_accuracy"],
        "load_seconds": lap["load"],
        "train_seconds": lap["train"],
        "val_seconds": lap["val"],
        "lr": lr_at(state.step, run.counts),
    }
    if run.options.dollars_per_hour:
        record["dollars"] = sum(lap.values()) / 3600 * run.options.dollars_per_hour
    if others:
        record["weights"] = recipe.publish
    for name, other in others.items():
        record[f"{name}_val_loss"] = other.loss
        record[f"{name}_top1_accuracy"] = other.top1_accuracy
        record[f"{name}_top5_accuracy"] = other.counts["top5_accuracy"]
    _write(run, record)
    print_line(
        f"epoch {record['epoch']}/{recipe.epochs} done  train loss {record['train_loss']:.4f}  {evaluation.summary()}\n"
        + "".join(f"  {recipe.publish} above, {name}: {other.summary()}\n" for name, other in others.items())
        + f"  load {lap['load']:.1f} s, train {lap['train']:.1f} s, validate {lap['val']:.1f} s; "
        f"waited for data {waiting_share(lap):.1%} of the training time{_bottleneck(run, lap)}"
    )
    if evaluation.bad_images:
        print_line(f"  unreadable: {shorten(list(evaluation.bad_images))}")
    bad = [f"{name} ({reason})" for name, reason in evaluation.bad_images.items()]
    write_lines(run, run.folder.bad_val_images, bad)


def print_end(run: Trainer) -> None:
    """Print the result, where everything is, and what to do next."""
    folder, state = run.folder, run.state
    path = json.dumps(str(folder.path), ensure_ascii=False)
    price = sum(record.get("dollars", 0.0) for record in folder.records())
    print_line(
        f"done in {duration(time.monotonic() - run.start_seconds)}"
        + (f", {price:,.2f} dollars in all" if price else "")
        + f": best top-1 {state.best_top1_accuracy:.2%} after epoch {run.counts.epoch_of(state.best_step)}\n"
        f"in {folder.path}:\n"
        "  model.safetensors  the best weights\n"
        "  eval.json          their accuracy\n"
        "  curves.png, .svg   loss and accuracy\n"
        "  log.jsonl          every number printed above\n"
        f"evaluate them:  {program('evaluate')} --ckpt {shlex.quote(str(folder.path))}\n"
        f"use them:       from resnet_in1k import ResNet; model = ResNet.from_pretrained({path})"
    )


def nonfinite_loss(run: Trainer, step: int, loss: float) -> UserError:
    """List the images of the batch, and return the error that ends the run."""
    # The batch of one process without accumulation is the global batch.
    counts = StepCounts(run.recipe, 1, 1, len(run.train_source))
    (spec,) = train_specs(run.train_source, counts, step, step)
    names = [run.train_source.image_name(sample.index) for sample in spec.samples]
    write_lines(run, run.folder.nonfinite_batch, names)
    return UserError(
        f"the loss of step {step:,} (epoch {counts.epoch_of(step)}, lr {lr_at(step, counts):g}) is {loss}; nothing was "
        f"saved since, the checkpoints before it are intact; the images of the batch are listed in "
        f"{run.folder.nonfinite_batch}; try a lower --lr, longer --warmup-epochs, or --precision fp32, in another "
        "--output-dir"
    )


def _lap(run: Trainer) -> Lap:
    """Return the times since the last lap, of the process that waited longest for data."""
    # In the other processes the same time is part of the step, in which they wait for that one's gradients.
    names = ("load", "train", "val")
    own = run.stopwatch.lap()
    everyone = run.launch.gather([own[name] for name in names], "measuring its speed")
    lap = Lap(dict(zip(names, max(everyone), strict=True)))  # "load" comes first
    run.epoch_lap.update(lap)
    return lap


def _write(run: Trainer, record: dict[str, Any]) -> None:
    run.launch.on_main_process(lambda: run.folder.append(record), "writing the log", SAVED_IS_INTACT)
    track(run, record)


def _bottleneck(run: Trainer, lap: Lap) -> str:
    advice = bottleneck(lap, run.num_workers)
    return "" if advice == "compute-bound" else f": {advice}"


def start_tracker(run: Trainer) -> None:
    """Continue the tracker's run that tracker.json names; if it names none, begin one and write it there."""
    file, name = run.folder.tracker, run.options.report_to
    runs: dict[str, dict[str, str]] = {}  # project and id of a run by the tracker's name
    if file.exists():
        with files.content_errors(file):
            runs = {key: {"project": each["project"], "id": each["id"]} for key, each in files.read_json(file).items()}
    is_new = name not in runs
    if is_new:  # with an id of its own, because two run folders may have the same name
        run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        runs[name] = {"project": run.folder.path.name, "id": run_id}
    run_id = runs[name]["id"]
    resume_arguments = {  # other trackers begin a run at each start
        "tensorboard": {"purge_step": run.first_step},  # hides the steps that are trained again
        "trackio": {"name": run_id, "resume": "allow"},
        "wandb": {"id": run_id, "resume": "allow"},
    }
    # Lists as text, which every tracker takes. Not for a resume: TensorBoard would show the settings again as a run.
    settings = {key: str(value) if isinstance(value, tuple) else value for key, value in vars(run.recipe).items()}
    try:
        run.accelerator.init_trackers(runs[name]["project"], settings if is_new else None, resume_arguments)
        if name == "wandb":  # see `track`
            run.accelerator.get_tracker(name, unwrap=True).define_metric("*", step_metric="step")
    except Exception as error:  # each tracker has errors of its own
        advice = "" if is_new else f", or remove {file} to begin a new run"
        raise UserError(
            f"--report-to: the tracker cannot be started ({first_line(error)}); fix that, or omit the flag{advice}"
        ) from None
    if name in resume_arguments:
        files.write_json(file, runs)


def track(run: Trainer, record: dict[str, Any]) -> None:
    values = {key: value for key, value in record.items() if key not in ("kind", "step")}
    with tracker_errors(run):
        for tracker in run.accelerator.trackers:  # at most one, on the main process alone
            if tracker.name == "wandb":  # it drops the values of a step that goes back, as after a resume
                tracker.log({**values, "step": record["step"]})
            else:
                tracker.log(values, step=record["step"])


@contextlib.contextmanager
def tracker_errors(run: Trainer) -> Iterator[None]:
    """Disable a tracker that fails during training: log.jsonl has every record."""
    try:
        yield
    except Exception as error:
        run.accelerator.trackers = []
        name, reason = run.options.report_to, first_line(error)
        print_line(f"logging to {name} failed ({reason}); it is disabled for the rest of the run")
