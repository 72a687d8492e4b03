"""What a dry run adds: the schedule epoch by epoch, and what the run would take here, by the speed just measured."""

import time
from collections.abc import Callable

import torch

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.data.loader import Batch, prefetch_to_device
from resnet_in1k.evaluate.evaluation import EVAL_BATCH_SIZE
from resnet_in1k.optim.lr import lr_at
from resnet_in1k.recipes.step_counts import StepCounts, train_image_size
from resnet_in1k.train.preflight import CPU_SMOKE_TEST_IMAGES
from resnet_in1k.train.trainer import Trainer
from resnet_in1k.utils import rng
from resnet_in1k.utils.device import reproducible_float32
from resnet_in1k.utils.format import dollars, duration
from resnet_in1k.utils.rng import Stream
from resnet_in1k.utils.timing import synchronize

MAX_ROWS = 16
BAR_WIDTH = 32
CPU_STEPS, DEVICE_STEPS = 2, 20
"""Measured steps, after one or as many that do not count."""
LOADED_IMAGES_PER_WORKER = 256


def describe_schedule(schedule: StepCounts) -> str:
    """A table of epochs: learning rate at the first and the last step, with a bar, and the training image size."""
    epochs = _epochs_to_show(schedule)
    borders = {
        epoch: [
            lr_at(step, schedule) for step in ((epoch - 1) * schedule.steps_per_epoch + 1, _last_step(schedule, epoch))
        ]
        for epoch in epochs
    }
    highest = max(max(rates) for rates in borders.values())
    lines = ["schedule      epoch  learning rate, from its first step to its last"]
    for epoch in epochs:
        first, last = borders[epoch]
        bar = "█" * max(1, round(BAR_WIDTH * last / highest))
        size = train_image_size(schedule.recipe, epoch)
        lines.append(f"              {epoch:5d}  {first:9.3g} → {last:<9.3g}  {size} px  {bar}")
    return "\n".join(lines)


def _last_step(schedule: StepCounts, epoch: int) -> int:
    return epoch * schedule.steps_per_epoch


def _epochs_to_show(schedule: StepCounts) -> list[int]:
    """All of them, or those around which something changes and some between, the first and the last among them."""
    recipe, number = schedule.recipe, schedule.recipe.epochs
    changes = {1, number, round(recipe.warmup_epochs), *(round(epoch) + 1 for epoch in recipe.lr_milestones)}
    changes |= {
        epoch
        for epoch in range(2, number + 1)
        if train_image_size(recipe, epoch) != train_image_size(recipe, epoch - 1)
    }
    for place in range(MAX_ROWS):
        if len(changes) >= MAX_ROWS:
            break
        changes.add(1 + round(place * (number - 1) / (MAX_ROWS - 1)))
    return sorted(epoch for epoch in changes if 1 <= epoch <= number)


def forecast(run: Trainer) -> str:
    """The schedule; how long the run would take, and what it would cost. Takes some steps, which are rolled_back."""
    recipe, schedule, on_cpu = run.recipe, run.schedule, run.device.type == "cpu"
    sizes = [train_image_size(recipe, epoch) for epoch in range(1, recipe.epochs + 1)]
    with run.train_step.rolled_back():
        step_rates = {size: step_rate(run, size) for size in sorted(set(sizes))}
    load_rate, eval_rate = loading_rate(run), evaluation_rate(run)
    # The slowest process sets the pace of all.
    mine = torch.tensor([[load_rate, eval_rate, *step_rates.values()]], dtype=torch.float64)
    slowest = (
        torch.tensor(run.launch.gather(mine[0].tolist(), "measures its speed")).amin(dim=0) * schedule.num_processes
    )
    load_rate, eval_rate, *rates = slowest.tolist()
    rate_of = dict(zip(step_rates, rates, strict=True))
    images = schedule.steps_per_epoch * recipe.global_batch_size

    def seconds_per_image(rate: float) -> float:
        compute, load = 1 / rate, 1 / load_rate
        return compute + load if on_cpu else max(compute, load)  # a CPU does both, beside a device loading is free

    train_seconds = sum(images * seconds_per_image(rate_of[size]) for size in sizes)
    eval_seconds = recipe.epochs * len(run.models) * len(run.val_source) * seconds_per_image(eval_rate)
    total = train_seconds + eval_seconds
    steps = ", ".join(f"{rate:,.0f} at {size} px" for size, rate in rate_of.items())
    price = run.options.dollars_per_hour
    return (
        f"{describe_schedule(schedule)}\n"
        f"forecast      about {duration(total)} on this hardware, of which validation {duration(eval_seconds)}"
        + (f"; {dollars(total, price)} at {price:g} dollars per hour" if price else "")
        + f"\n              measured now, images/s: training steps {steps}; loading {load_rate:,.0f}; validation "
        f"{eval_rate:,.0f}"
    )


def step_rate(run: Trainer, size: int) -> float:
    """Images/s of augmentation and training steps of this process, at one image size, without loading.

    On a CPU, where whole batches would take minutes, from two small ones: a step takes some time for the update, and
    some for each image.
    """
    part, few = run.schedule.per_device_batch_size, CPU_SMOKE_TEST_IMAGES
    if run.device.type != "cpu" or part <= few:
        return part / _seconds_for_part(run, size, part)
    seconds = _seconds_for_part(run, size, few)
    for_an_image = (seconds - _seconds_for_part(run, size, few // 4)) / (few - few // 4)
    return part / (seconds + (part - few) * max(for_an_image, 0.1 * seconds / few))


def _seconds_for_part(run: Trainer, size: int, part: int) -> float:
    """Of a step, divided by its forward passes, of `part` images each."""
    num_steps = CPU_STEPS if run.device.type == "cpu" else DEVICE_STEPS
    number = part * run.schedule.gradient_accumulation_steps
    images = torch.randint(
        0, 256, (number, 3, size, size), dtype=torch.uint8, generator=rng.generator(0, Stream.AUGMENT, 0)
    )
    labels = torch.arange(number) % len(run.train_source.class_names)

    def step() -> None:
        (prefetched,) = prefetch_to_device([Batch(images, labels, labels)], run.device, run.augmentation.prepare)
        run.train_step(*prefetched.tensors(), lr_at(1, run.schedule))

    return part / _rate(run, step, num_steps, number)


def loading_rate(run: Trainer) -> float:
    """Images/s of this process's loader: files to batches in host memory, small ones, so that all workers have some."""
    batch_size, workers = run.schedule.per_process_batch_size, max(1, run.workers)
    batch_size = min(batch_size, LOADED_IMAGES_PER_WORKER // 2)
    number = max(1, min(LOADED_IMAGES_PER_WORKER * workers // batch_size, run.schedule.total_steps))
    order = run.train_order(1, number)
    start_seconds = time.monotonic()
    specs = (spec._replace(samples=spec.samples[:batch_size]) for spec in order)
    loaded = sum(len(batch.labels) for batch in run.train_loader.batches(specs))
    return loaded / (time.monotonic() - start_seconds)


def evaluation_rate(run: Trainer) -> float:
    """Images/s of this process's forward passes in evaluation."""
    on_cpu = run.device.type == "cpu"
    number, size = CPU_SMOKE_TEST_IMAGES if on_cpu else EVAL_BATCH_SIZE, run.recipe.eval_size
    images = normalize(torch.zeros(number, 3, size, size, dtype=torch.uint8, device=run.device))
    run.eval_model.eval()
    with torch.inference_mode(), reproducible_float32():
        return _rate(run, lambda: run.eval_model(images), CPU_STEPS if on_cpu else DEVICE_STEPS, number)


def _rate(run: Trainer, do: Callable[[], object], number: int, images: int) -> float:
    """Images/s of doing it so often, after half as often that does not count."""
    for _ in range(max(1, number // 2)):
        do()
    synchronize(run.device)
    start_seconds = time.monotonic()
    for _ in range(number):
        do()
    synchronize(run.device)
    return number * images / (time.monotonic() - start_seconds)
