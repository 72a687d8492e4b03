"""Before the first step, in seconds: what would else stop a run in its first hours, or at its first checkpoint."""

import math
import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import save

from resnet_in1k import files, randomness
from resnet_in1k.augment import augment, draw, normalise
from resnet_in1k.checkpoint import TrainState, load_checkpoint, optimizer_tensors, save_checkpoint
from resnet_in1k.devices import inference_memory_explained, local_world_size
from resnet_in1k.errors import BadImageError, UserError
from resnet_in1k.evaluation import EVAL_BATCH_SIZE
from resnet_in1k.images import decode
from resnet_in1k.model import ResNet, weights_to_save
from resnet_in1k.optim import build_optimizer, lr_at
from resnet_in1k.pipeline import OnBadImage, shared_bytes_needed, worker_context
from resnet_in1k.plan import Plan
from resnet_in1k.randomness import Stream
from resnet_in1k.sources import Source
from resnet_in1k.step import TrainStep
from resnet_in1k.stopwatch import size

SAMPLED_AT_EACH_PLACE = 4
"""Images decoded from the beginning, the middle and the end of a split."""
CPU_REHEARSAL_IMAGES = 16
"""On a CPU a whole batch would take minutes, and memory is not what fails there."""


def classes_told(train: Source, val: Source) -> str:
    """How many classes, and how unequal they are."""
    counts = [Counter(source.labels.tolist()).values() for source in (train, val)]
    spans = [f"{min(c):,}" if min(c) == max(c) else f"{min(c):,} to {max(c):,}" for c in counts]
    return f"{len(train.class_names):,}, with {spans[0]} training and {spans[1]} validation images each"


def check_images(source: Source, on_bad_image: OnBadImage) -> str:
    """Decode a sample from both ends and the middle.

    Raises:
        BadImageError: for a training image, unless bad ones are to be skipped; in validation they count as wrong.
    """
    middle, last = len(source) // 2, len(source) - 1
    places = {
        min(max(place, 0), last)
        for first in (0, middle, last - SAMPLED_AT_EACH_PLACE + 1)
        for place in range(first, first + SAMPLED_AT_EACH_PLACE)
    }
    bad: list[str] = []
    for place in sorted(places):
        try:
            decode(source.read(place))
        except OSError as error:
            raise UserError(f"{source.image_name(place)} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            if source.split == "train" and on_bad_image == "fail":
                raise BadImageError.about(source.image_name(place), str(error)) from None
            bad.append(f"{source.image_name(place)} ({error})")
    told = f"{len(places)} {source.split} images decoded"
    return f"{told}, but {len(bad)} of them cannot be: {'; '.join(bad)}" if bad else told


def check_disk(folder: Path, checkpoints: Path, model: torch.nn.Module, keep_checkpoints: int) -> str:
    """Whether the newest checkpoints, the best, the one being written and the best weights have room in `folder`.

    Raises:
        UserError: if they have not.
    """
    weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    checkpoint_bytes = weight_bytes + sum(parameter.nbytes for parameter in model.parameters())
    num_checkpoints = keep_checkpoints + 2
    there = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
    needed, free = num_checkpoints * checkpoint_bytes + 2 * weight_bytes - there, shutil.disk_usage(folder).free
    told = f"{size(free)} free, {size(max(needed, 0))} to be written: {num_checkpoints} checkpoints, the best weights"
    if needed > free:
        raise UserError(f"{folder} has too little room: {told}; free some, or choose fewer --keep-checkpoints")
    return told


def check_workers(workers: int, batch_size: int, image_size: int) -> str:
    """Whether loader workers can be started, and their shared memory be had.

    Raises:
        UserError: if not.
    """
    if workers == 0:
        return "none: images are loaded by the training process itself"
    try:
        multiprocessing.get_context(worker_context()).Lock()
    except OSError as error:
        raise UserError(
            f"loader workers cannot be started: no semaphore to be had ({error.strerror}); is there a /dev/shm, and "
            "is it full (df -h /dev/shm)?"
        ) from None
    needed = shared_bytes_needed(workers, batch_size, image_size) * local_world_size()
    shared_memory = Path("/dev/shm")
    if worker_context() != "fork" and shared_memory.is_dir():
        available, what = shutil.disk_usage(shared_memory).free, "/dev/shm"
    else:
        available, what = psutil.virtual_memory().available, "memory"
    told = f"{size(needed)} of memory to share with them, {size(available)} of {what} available"
    if needed > available:
        raise UserError(f"too little for {workers} loader workers: {told}; take fewer --workers or a smaller batch")
    return told


def rehearse(
    train_step: TrainStep,
    eval_model: ResNet,
    plan: Plan,
    device: torch.device,
    folder: Path,
    on_main_process: Callable[[Callable[[], None]], None],
) -> tuple[str, str]:
    """One step on made-up images, saved in `folder`, loaded, compared; then all is forgotten again.

    Raises:
        UserError: if the step fails in a way that the recipe can mend, or what is loaded is not what was saved.
    """
    recipe = plan.recipe
    size_of_part = plan.per_device_batch_size
    if device.type == "cpu":
        size_of_part = min(size_of_part, CPU_REHEARSAL_IMAGES)
    num_images = size_of_part * plan.gradient_accumulation_steps
    shape = (num_images, 3, recipe.image_size, recipe.image_size)
    generator = randomness.generator(recipe.seed, Stream.AUGMENT, 0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    labels = torch.arange(num_images, device=device) % train_step.model.fc.out_features
    with train_step.rehearsal():
        start_seconds = time.monotonic()
        try:
            batch = augment(images, draw(recipe, 0)[:num_images])
            loss = train_step(batch, labels, lr_at(1, recipe, plan.steps_per_epoch)).item()
        except ValueError as error:  # a norm over a single value
            raise UserError(
                f"a step of {size_of_part} images of {recipe.image_size} px on each device cannot be taken ({error}); "
                "take a larger --global-batch-size or --image-size"
            ) from None
        if not math.isfinite(loss):
            raise UserError(f"the loss of a first step is {loss}; try --precision fp32")
        eval_images = images[:1].expand(EVAL_BATCH_SIZE if device.type != "cpu" else 1, -1, -1, -1)
        with torch.inference_mode(), inference_memory_explained(len(eval_images)):
            eval_model.eval()(normalise(eval_images))
        step_told = f"forward and backward of {num_images} images in {time.monotonic() - start_seconds:.1f} s"

        start_seconds = time.monotonic()
        on_main_process(lambda: _save_load_compare(train_step, eval_model, plan, folder))
        return step_told, f"saved, loaded and found the same in {time.monotonic() - start_seconds:.1f} s"


def _save_load_compare(train_step: TrainStep, eval_model: ResNet, plan: Plan, folder: Path) -> None:
    weights = weights_to_save(train_step.model)
    momentum = optimizer_tensors(train_step.model, train_step.optimizer)
    with tempfile.TemporaryDirectory(dir=folder, prefix=files.TEMPORARY_FOLDER) as temporary:
        state = TrainState(step=1, grad_scaler=train_step.scaler_state())
        saved = save_checkpoint(Path(temporary), state, weights, momentum)
        other_optimizer = build_optimizer(eval_model, plan.recipe)
        load_checkpoint(saved, eval_model, other_optimizer)
    loaded = weights_to_save(eval_model), optimizer_tensors(eval_model, other_optimizer)
    if (save(loaded[0]), save(loaded[1])) != (save(weights), save(momentum)):  # as bytes: nan is nan
        raise UserError(f"what was saved in {folder} is not what was loaded from it; choose another --output-dir")
