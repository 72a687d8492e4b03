"""The plan of a run; and a dry run's schedule by epoch, with the time and price that the measured speed predicts."""

import math
import time
from collections.abc import Callable

import torch

from resnet_in1k.optim.lr import describe_lr, lr_at
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.step_counts import StepCounts, train_image_size
from resnet_in1k.train.preflight import evaluate_batch, generated_batch, take_step
from resnet_in1k.train.step import adjusted_ema_decay
from resnet_in1k.train.trainer import Trainer
from resnet_in1k.utils.device import hardware_name, missing_capabilities
from resnet_in1k.utils.format import count, duration, printable
from resnet_in1k.utils.timing import synchronize
from resnet_in1k.utils.validation import PRECISIONS

MAX_ROWS = 16
CPU_STEPS, DEVICE_STEPS = 2, 20
"""Measured steps, after half as many for warm-up."""
LOADED_IMAGES_PER_WORKER = 256


def describe_plan(run: Trainer) -> str:
    """Return one line for each decision of the recipe, the data and the machine."""
    recipe, counts, train, val = run.recipe, run.counts, run.train_source, run.val_source
    named = RECIPES.get(run.recipe_name)
    changed = named.recipe.differences(recipe) if named else []
    first, last = (train_image_size(recipe, epoch) for epoch in (1, recipe.epochs))
    sizes = f"{first} px" + (f", growing to {last} px" if last != first else "")
    sizes += f", evaluated at {recipe.eval_size} px" if recipe.eval_size != last else ""
    processes, accumulation = count(counts.num_processes, "process", "es"), counts.gradient_accumulation_steps
    batch = f"{recipe.global_batch_size} global = {processes} × {counts.per_process_batch_size}"
    batch += f" in {accumulation} accumulation steps of {counts.per_device_batch_size}" if accumulation > 1 else ""
    left_over = counts.num_train_images - counts.steps_per_epoch * recipe.global_batch_size
    dropped = f" ({count(left_over, 'image')} dropped, different images each epoch)" if left_over else ""
    steps = f"{counts.steps_per_epoch:,} an epoch{dropped} × {count(recipe.epochs, 'epoch')} = {counts.total_steps:,}"
    average = (
        f"of the weights, every {count(counts.ema_every_steps, 'step')}, decay {adjusted_ema_decay(counts):.4g}; both "
        f"are evaluated, {'the average' if recipe.publish == 'ema' else 'the model'} is published"
    )
    precision = f"{PRECISIONS[run.accelerator.mixed_precision]}, channels_last"
    precision += ", compiled" if run.options.compile else ""
    rows = [
        ("recipe", run.recipe_name + (f", but {'; '.join(changed)}" if changed else "")),
        ("model", f"{recipe.model}, {count(len(train.class_names), 'class', 'es')}, {sizes}"),
        *([("starts from", f"{run.init_from['checkpoint']}, {run.init_from['head']}")] if run.init_from else []),
        *([("teacher", describe_teacher(run))] if run.teacher else []),
        ("data", f"{train.name}: {len(train):,} training and {len(val):,} validation images"),
        ("batch", batch),
        ("steps", steps),
        ("learning rate", describe_lr(recipe)),
        *([("average", average)] if recipe.ema_decay else []),
        ("precision", f"{precision}; evaluation in float32"),
        ("device", hardware_name(run.device) + (" (no GPU is used)" if run.device.type == "cpu" else "")),
        ("per process", f"{count(run.num_workers, 'loader worker')}, {count(run.cpu_threads, 'CPU thread')}"),
        *(("note", text) for text in missing_capabilities(run.device.type)),
        *(("note", text) for text in dict.fromkeys([train.note, val.note]) if text),
    ]
    if len(train.class_names) < 5:
        rows.append(("note", f"fewer than five classes: top-5 below means top-{len(train.class_names)}"))
    return "\n".join(["plan", *(f"  {name:<14}{printable(text)}" for name, text in rows)])


def describe_teacher(run: Trainer) -> str:
    weight, temperature = run.recipe.teacher_weight, run.recipe.teacher_temperature
    text = f"{run.teacher['checkpoint']}, {run.teacher['architecture']}: {weight:.0%} of the loss, at temperature"
    return "\n                ".join(filter(None, [f"{text} {temperature:g}", *run.teacher["outputs"].split("\n")]))


def describe_schedule(counts: StepCounts) -> str:
    """Return a table of epochs: learning rate at the first and the last step, and the training image size."""
    lines = ["schedule      epoch  learning rate, from its first step to its last"]
    epochs = counts.recipe.epochs
    for epoch in sorted({*range(1, epochs, math.ceil(epochs / MAX_ROWS)), epochs}):
        last_step = epoch * counts.steps_per_epoch
        first, last = lr_at(last_step - counts.steps_per_epoch + 1, counts), lr_at(last_step, counts)
        size = train_image_size(counts.recipe, epoch)
        lines.append(f"              {epoch:5d}  {first:9.3g} → {last:<9.3g}  {size} px")
    return "\n".join(lines)


def forecast(run: Trainer) -> str:
    """Return the schedule, and the time and price of the run on this machine. The measured steps are rolled back."""
    recipe, counts, on_cpu = run.recipe, run.counts, run.device.type == "cpu"
    size_of_epochs = [train_image_size(recipe, epoch) for epoch in range(1, recipe.epochs + 1)]
    sizes = sorted(set(size_of_epochs))
    with run.train_step.rolled_back():
        batches = (generated_batch(run, size) for size in sizes)  # not within the time that is measured
        rates = [rate_of(run, lambda batch=batch: (take_step(run, batch), len(batch.labels))[1]) for batch in batches]
    rates = [loading_rate(run), rate_of(run, lambda: evaluate_batch(run)), *rates]
    everyone = torch.tensor(run.launch.gather(rates, "measuring its speed"), dtype=torch.float64)
    # The slowest process sets the pace of all.
    load_rate, eval_rate, *step_rates = (everyone.amin(dim=0) * counts.num_processes).tolist()
    rate_at = dict(zip(sizes, step_rates, strict=True))

    def seconds_per_image(rate: float) -> float:
        # A CPU computes and loads in turns; a device computes while the host loads.
        return 1 / rate + 1 / load_rate if on_cpu else max(1 / rate, 1 / load_rate)

    images_per_epoch = counts.steps_per_epoch * recipe.global_batch_size
    train_seconds = sum(images_per_epoch * seconds_per_image(rate_at[size]) for size in size_of_epochs)
    eval_seconds = recipe.epochs * len(run.models) * len(run.val_source) * seconds_per_image(eval_rate)
    total = train_seconds + eval_seconds
    steps = ", ".join(f"{rate:,.0f} at {size} px" for size, rate in rate_at.items())
    price = run.options.dollars_per_hour
    return (
        f"{describe_schedule(counts)}\n"
        f"forecast      about {duration(total)} on this hardware without saving, of which validation "
        f"{duration(eval_seconds)}"
        + (f"; {total / 3600 * price:,.2f} dollars at {price:g} dollars per hour" if price else "")
        + f"\n              measured now, images/s: training steps {steps}; loading {load_rate:,.0f}; validation "
        f"{eval_rate:,.0f}"
    )


def loading_rate(run: Trainer) -> float:
    """Measure images/s of this process's loader, from files to batches in host memory."""
    # Small batches, so that every worker makes some.
    num_workers = max(1, run.num_workers)
    batch_size = min(run.counts.per_process_batch_size, LOADED_IMAGES_PER_WORKER // 2)
    number = max(1, min(LOADED_IMAGES_PER_WORKER * num_workers // batch_size, run.counts.total_steps))
    specs = (spec._replace(samples=spec.samples[:batch_size]) for spec in run.specs(1, number))
    start_seconds = time.monotonic()
    loaded = sum(len(batch.labels) for batch in run.train_loader.batches(specs))
    return loaded / (time.monotonic() - start_seconds)


def rate_of(run: Trainer, call: Callable[[], int]) -> float:
    """Measure images/s of a call that returns its number of images, after a warm-up."""
    num_calls = CPU_STEPS if run.device.type == "cpu" else DEVICE_STEPS
    for _ in range(num_calls // 2):
        call()
    synchronize(run.device)
    start_seconds = time.monotonic()
    num_images = sum(call() for _ in range(num_calls))
    synchronize(run.device)
    return num_images / (time.monotonic() - start_seconds)
