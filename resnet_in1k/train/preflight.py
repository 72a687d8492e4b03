"""Checks before the first step, in seconds, of what would stop a run in its first hours or at its first checkpoint."""

import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.data.dataset import Source, sample_sums, spread_over
from resnet_in1k.data.decode import IfBad, OnBadImage, read_image, wide_bits
from resnet_in1k.data.loader import Batch, prefetch_to_device
from resnet_in1k.optim.lr import lr_at
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import EVAL_BATCH_SIZE, StepCounts, accumulation_steps
from resnet_in1k.run_folder import RunFolder, provenance
from resnet_in1k.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.train.trainer import Trainer
from resnet_in1k.train.writer import lock_folder
from resnet_in1k.utils import files, rng
from resnet_in1k.utils.console import print_line
from resnet_in1k.utils.device import available_memory, reproducible_float32, usable_cores
from resnet_in1k.utils.errors import UserError, translate_errors
from resnet_in1k.utils.format import count, duration, file_size
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.pool import worker_context
from resnet_in1k.utils.process import local_rank, local_world_size
from resnet_in1k.utils.rng import Stream

NUM_SAMPLED_IMAGES = 13
"""Images of each split that are decoded: an odd number has the first, the middle and the last."""
CPU_TEST_PIXELS = 16 * 224**2  # in a forward pass
VISIBLE_WITHIN_SECONDS = 10.0
"""A network file system may show a new file that much later."""


def check_same_program(launch: Launch, recipe: Recipe, options: TrainOptions, folder: RunFolder) -> None:
    """Refuse differences between processes in commit, library versions, recipe, options, recipe.json and clock."""
    made_by, of_one_machine = provenance(), ("workers", "cpu_threads")
    values = {"commit": made_by["commit"], **made_by["versions"], **vars(recipe)}
    values |= {name: str(value) for name, value in vars(options).items() if name not in of_one_machine}
    values[str(folder.recipe)] = files.sha256_of(folder.recipe) if folder.recipe.exists() else "missing"
    launch.wait_for_everyone("starting")  # so that a process that starts late does not read an old time of the main one
    off = abs(time.time() - launch.on_main_process(time.time, "starting"))
    values["clock"] = f"{duration(off)} off" if off > 60 else "right"  # else file times and logs would be misleading
    advice = "all processes need the same program, command, run folder and time (by NTP)"
    refuse_differences(launch, values, "starting", advice)


def refuse_differences(launch: Launch, values: dict[str, str], doing: str, advice: str) -> None:
    """Raise UserError on all processes for the first of these values that is not the main process's, by its name."""
    everyone = launch.gather((launch.machine, values), doing)
    main_machine, main = everyone[0]
    for machine, other in everyone:
        for name, value in other.items():
            if value != main.get(name):
                difference = f"{name}: {value} there, {main.get(name)} here"
                raise UserError(f"{machine} differs from {main_machine}: {difference}; {advice}")


def preflight(run: Trainer) -> None:
    """Check machines, data and disk, take a step, save and load a checkpoint, and print the results.

    From here on the run folder is locked by this run, unless it is a dry run. The cheapest checks come first. The step
    comes before the disk, because optimizers make their state in it. Each check raises UserError if it fails.
    """
    launch, sources = run.launch, (run.train_source, run.val_source)
    check_same_data(launch, sources)
    class_sizes = [np.bincount(source.labels, minlength=len(source.class_names)).tolist() for source in sources]
    train, val = (f"{min(c):,} to {max(c):,}" if min(c) < max(c) else f"{min(c):,}" for c in class_sizes)
    classes = f"{len(run.train_source.class_names):,}, with {train} training and {val} validation images each"
    results = {"classes": classes, **check_machines(run)}
    with run.train_step.rolled_back():
        results["step"] = smoke_test(run)
        tensors = {name: group.tensors() for name, group in run.groups.items()}
    results["disk"] = launch.on_main_process(lambda: check_disk(run, tensors), "checking its disk")
    if not run.options.dry_run:
        lock_folder(run)
        check_run_folder_is_shared(launch, run.folder)
    with run.train_step.rolled_back():
        results["checkpoint"] = launch.on_main_process(
            lambda: save_load_compare(run, tensors), "saving and loading a checkpoint"
        )
    print_line("\n".join(["preflight", *(f"  {name:<14}{text}" for name, text in results.items())]))


def check_same_data(launch: Launch, sources: tuple[Source, Source]) -> None:
    """Refuse differences between machines in the bytes of 64 images of each split, by the main process's list."""
    if launch.world_size > 1:
        compared = sources if local_rank() == 0 else ()  # by one process of each machine
        sums = {name: sha256 for source in compared for name, sha256 in sample_sums(source, 64).items()}
        refuse_differences(launch, sums, "reading images", "all machines need the same files at this path")


def check_run_folder_is_shared(launch: Launch, folder: RunFolder) -> None:
    """Refuse machines that do not see the run folder, which the main process has just locked.

    All processes read checkpoints from it, and after a requeue any machine may be the first.
    """

    def lock_text() -> str:
        try:
            return folder.lock.read_text(encoding="utf-8")
        except OSError:
            return "missing"

    written = launch.on_main_process(lock_text, "locking the run folder")
    deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
    while (seen := lock_text()) != written and time.monotonic() < deadline:
        time.sleep(0.5)
    advice = "put the run folder on storage that all machines share, and start all of them in the same folder"
    refuse_differences(launch, {str(folder.lock): seen}, "reading the run folder", advice)


def check_machines(run: Trainer) -> dict[str, str]:
    """Let the first process of each machine read images there and check its memory. All raise the error of one."""
    images = machine = problem = ""
    if local_rank() == 0:
        try:
            sources = (run.train_source, run.val_source)
            images = "; ".join(check_images(source, run.options.on_bad_image) for source in sources)
            shared_bytes = run.train_loader.slots.nbytes + run.eval_loader.slots.nbytes
            machine = check_memory(run.num_workers, shared_bytes * local_world_size())
        except UserError as error:
            problem = str(error)
    everyone = run.launch.gather((run.launch.machine, machine, problem), "checking its machine")
    checked = [each for each in everyone if each[1] or each[2]]
    several = len(checked) > 1
    for name, _, problem in checked:
        if problem:
            raise UserError(f"{name}: {problem}" if several else problem)
    lines = [f"{name}: {machine}" if several else machine for name, machine, _ in checked]
    return {"images": images, "machine": f"\n  {'':<14}".join(lines)}


def check_images(source: Source, on_bad_image: OnBadImage) -> str:
    """Decode a sample, with the first, the middle and the last image; bad ones are an error where they would be one."""
    bad: dict[int, str] = {}
    if_bad: IfBad = "fail" if source.split == "train" and on_bad_image == "fail" else "blank"
    indices = spread_over(source, NUM_SAMPLED_IMAGES)
    for index in indices:
        read_image(source, index, if_bad, bad)
    text = f"{len(indices)} {source.split} images decoded"
    bits = [wide_bits(source.read(index)) for index in indices if index not in bad]
    if narrow := [number for number in bits if 0 < number < 16]:
        text += f"; {len(narrow)} of them use {max(narrow)} of their 16 bits, and are scaled by these"
    names = [f"{source.image_name(index)} ({reason})" for index, reason in bad.items()]
    return f"{text}; {len(bad)} cannot be read: {'; '.join(names)}" if bad else text


def check_memory(num_workers: int, shared_bytes: int) -> str:
    """Describe this machine. Raises UserError if it has too little memory to share with the workers."""
    memory, shared_memory = available_memory(), Path("/dev/shm")
    free = shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else None
    text = (
        f"{count(usable_cores(), 'core')} for {count(local_world_size(), 'process', 'es')} with "
        f"{count(num_workers, 'loader worker')} each; {file_size(memory)} of memory"
        + (f" and {file_size(free)} of /dev/shm" if free is not None else "")
        + f" available, {file_size(shared_bytes)} of shared memory needed"
    )
    limit = free if free is not None and worker_context() != "fork" else memory
    if num_workers and shared_bytes > limit:
        raise UserError(f"too little memory for {count(num_workers, 'loader worker')}: {text}; use fewer --workers")
    return text


def check_disk(run: Trainer, tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Check that the newest checkpoints, the best, the one being written and the best weights fit on the disk."""
    group_bytes = {name: sum(tensor.nbytes for tensor in group.values()) for name, group in tensors.items()}
    folder, num_checkpoints = files.nearest_existing(run.folder.path), run.options.keep_checkpoints + 2
    existing = sum(file.stat().st_size for file in run.folder.checkpoints.rglob("*") if file.is_file())
    needed = num_checkpoints * sum(group_bytes.values()) + 2 * group_bytes["model"] - existing
    free = shutil.disk_usage(folder).free
    needs = f"{file_size(max(needed, 0))} needed for {num_checkpoints} checkpoints and the best weights"
    text = f"{file_size(free)} free, {needs}"
    if needed > free:
        raise UserError(f"{folder} has too little space: {text}; free some, or choose fewer --keep-checkpoints")
    return text


def smoke_test(run: Trainer) -> str:
    """Take a training step and evaluate a batch of generated images, by the run's own code.

    This must precede the first step of a resumed run, too: from its second step on, DistributedDataParallel sends
    gradients in the order in which they were ready in the first, and another order rounds the sums of four processes
    differently.
    """
    start_seconds, image_size = time.monotonic(), run.recipe.image_size
    batch = generated_batch(run, image_size)
    try:
        loss = take_step(run, batch, num_batches=2)
        if run.device.type != "cpu":  # a second step needs more memory, because the optimizer then has its state
            take_step(run, batch, num_batches=2)
    except ValueError as error:  # a norm over a single value
        advice = "use a larger --global-batch-size or --image-size"
        raise UserError(f"a step with images of {image_size} px failed ({error}); {advice}") from None
    if not math.isfinite(loss):
        raise UserError(f"the loss of a first step is {loss.item()}; try --precision fp32")
    evaluate_batch(run)
    return f"forward and backward of {count(len(batch.labels), 'image')} in {time.monotonic() - start_seconds:.1f} s"


def generated_batch(run: Trainer, image_size: int) -> Batch:
    """Generate the images of an optimizer step, in memory like the loader's batches."""
    num_images = _num_images(run, run.counts.per_device_batch_size, image_size) * run.counts.gradient_accumulation_steps
    shape, generator = (num_images, image_size, image_size, 3), rng.generator(0, Stream.AUGMENT, 0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = np.arange(num_images) % len(run.train_source.class_names)
    first_step = run.counts.frozen_steps + 1  # before it only the last layer would train
    return Batch.pack(images, labels, labels, first_step, {})


def take_step(run: Trainer, batch: Batch, num_batches: int = 1) -> Tensor:
    """Take a step of the complete network and return its loss, with that many batches on the device, as training has
    two: the step's and the next one."""
    # A CPU prepares only the batch that it takes.
    (_, take), *_in_memory = prefetch_to_device([batch] * num_batches, run.device, run.augmentation.apply_to)
    images, targets, *drawn = take()
    return run.train_step(images, targets, lr_at(1, run.counts), batch.step, *drawn)


def evaluate_batch(run: Trainer) -> int:
    """Evaluate generated images and return their number."""
    size = run.recipe.eval_size
    num_images = _num_images(run, EVAL_BATCH_SIZE, size)
    images = torch.zeros(num_images, 3, size, size, dtype=torch.uint8, device=run.device)
    with torch.inference_mode(), reproducible_float32(), translate_errors(num_images):
        run.eval_model.eval()(normalize(images))
    return num_images


def _num_images(run: Trainer, batch_size: int, image_size: int) -> int:
    """Return the images of a forward pass: on a CPU fewer, where a batch may take minutes and memory is not short."""
    fitting = 2 * max(1, CPU_TEST_PIXELS // (2 * image_size**2))  # an even number, because neighbors may be mixed
    return min(batch_size, fitting) if run.device.type == "cpu" else batch_size


def save_load_compare(run: Trainer, tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Save these tensors as a checkpoint where the run will, load it, and compare all tensors.

    The run must have other tensors before, or the comparison could not fail; afterwards it has these.
    """
    start_seconds, folder = time.monotonic(), files.nearest_existing(run.folder.path)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as temporary:
        load_checkpoint(save_checkpoint(Path(temporary), TrainState(step=1), tensors), run.groups, recipe_sha256="")
    for name, group in run.groups.items():
        if save(group.tensors()) != save(dict(tensors[name])):  # as bytes, because NaN differs from NaN
            raise UserError(f"a checkpoint read from {folder} differs from what was saved; choose another --output-dir")
    return f"saved, reloaded and verified in {time.monotonic() - start_seconds:.1f} s"


def memory_advice(counts: StepCounts) -> str:
    """Return what to do if a forward pass of training does not fit into memory."""
    if counts.per_device_batch_size == 1:
        return "use a smaller --image-size"
    batch = counts.recipe.global_batch_size
    steps = accumulation_steps(batch, counts.num_processes, counts.per_device_batch_size - 1)
    return (
        f"--gradient-accumulation-steps {steps} makes it {counts.per_process_batch_size // steps} and keeps the global "
        f"batch of {batch}; what was saved is intact, resume with --resume"
    )
