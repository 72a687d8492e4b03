"""Before the first step, in seconds: what would otherwise stop a run in its first hours, or at its first checkpoint."""

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import OnBadImage, decode
from resnet_in1k.data.loader import Batch, prefetch_to_device, shared_bytes_needed
from resnet_in1k.evaluate.evaluation import EVAL_BATCH_SIZE
from resnet_in1k.optim.lr import lr_at
from resnet_in1k.train.agreement import check_run_folder_is_shared
from resnet_in1k.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from resnet_in1k.train.trainer import Trainer
from resnet_in1k.utils import files, rng
from resnet_in1k.utils.device import (
    available_memory,
    local_world_size,
    reproducible_float32,
    translate_memory_errors,
    usable_cores,
)
from resnet_in1k.utils.distributed import local_rank
from resnet_in1k.utils.errors import BadImageError, UserError
from resnet_in1k.utils.format import count, file_size
from resnet_in1k.utils.pool import worker_context
from resnet_in1k.utils.rng import Stream

SAMPLED_AT_EACH_PLACE = 4
"""Images decoded from the start, the middle and the end of a split."""
CPU_SMOKE_TEST_IMAGES = 16
"""On a CPU a whole batch would take minutes, and memory is not what fails there."""


def preflight(run: Trainer) -> None:
    """Check data, machines and disk, take a step, save and load a checkpoint, and report all of it.

    From here on the run folder is locked by this run, unless it is a dry run.

    Raises:
        UserError: if something will not do.
    """
    launch = run.launch
    results = {"classes": describe_classes(run.train_source, run.val_source), **check_machines(run)}
    with run.train_step.rolled_back():
        results["step"] = smoke_test(run)
        tensors = {name: group.tensors() for name, group in run.groups.items()}
    launch.on_main_process(lambda: results.update(disk=check_disk(run, tensors)), "looks at its disk", advice="")
    if not run.options.dry_run:
        run.writer.acquire_lock()
        check_run_folder_is_shared(launch, run.folder)

    def try_checkpoint() -> None:
        results["checkpoint"] = save_load_compare(run, tensors)

    with run.train_step.rolled_back():
        launch.on_main_process(try_checkpoint, "saves and loads a checkpoint", advice="")
    run.console.print("\n".join(["preflight", *(f"  {name:<14}{text}" for name, text in results.items())]))


def check_machines(run: Trainer) -> dict[str, str]:
    """The first process of each machine reads images there and looks at its cores and memory.

    Raises:
        UserError: on all processes, naming the first machine that will not do.
    """
    found: dict[str, str] = {}

    def check() -> None:
        sources = (run.train_source, run.val_source)
        found["images"] = "; ".join(check_images(source, run.options.on_bad_image) for source in sources)
        train_bytes = shared_bytes_needed(run.workers, run.schedule.per_process_batch_size, run.recipe.image_size)
        eval_bytes = shared_bytes_needed(run.workers, EVAL_BATCH_SIZE, run.recipe.eval_size)
        found["machine"] = check_machine(run.workers, (train_bytes + eval_bytes) * local_world_size())

    problem = files.failure_of(check) if local_rank() == 0 else None
    everyone = run.launch.gather((run.launch.machine, problem, found), "looks at its machine")
    machines = [each for each in everyone if each[1] or each[2]]
    several = len(machines) > 1
    for machine, problem, _ in machines:
        if problem:
            raise UserError(f"{machine}: {problem}" if several else problem)
    if several:
        lines = [f"{machine}: {theirs['machine']}" for machine, _, theirs in machines]
        found["machine"] = f"\n  {'':<14}".join(lines)
    return found


def describe_classes(train: Source, val: Source) -> str:
    """How many classes, and how many images in the smallest and the largest."""
    counts = [Counter(source.labels.tolist()).values() for source in (train, val)]
    spans = [f"{min(c):,}" if min(c) == max(c) else f"{min(c):,} to {max(c):,}" for c in counts]
    return f"{len(train.class_names):,}, with {spans[0]} training and {spans[1]} validation images each"


def check_images(source: Source, on_bad_image: OnBadImage) -> str:
    """Decode a sample from both ends and the middle.

    Raises:
        BadImageError: for a training image, unless bad ones are to be skipped; in validation they count as wrong.
    """
    middle, last = len(source) // 2, len(source) - 1
    indices = {
        min(max(index, 0), last)
        for first in (0, middle, last - SAMPLED_AT_EACH_PLACE + 1)
        for index in range(first, first + SAMPLED_AT_EACH_PLACE)
    }
    bad: list[str] = []
    for index in sorted(indices):
        try:
            decode(source.read(index))
        except OSError as error:
            raise UserError(f"{source.image_name(index)} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            if source.split == "train" and on_bad_image == "fail":
                raise BadImageError.about(source.image_name(index), str(error)) from None
            bad.append(f"{source.image_name(index)} ({error})")
    text = f"{len(indices)} {source.split} images decoded"
    return f"{text}, but {len(bad)} of them cannot be: {'; '.join(bad)}" if bad else text


def check_machine(workers: int, shared_bytes: int) -> str:
    """What this machine has for its processes and their workers, which share so much memory with them.

    Raises:
        UserError: if the memory is not available.
    """
    memory, shared_memory = available_memory(), Path("/dev/shm")
    free = shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else None
    text = (
        f"{count(usable_cores(), 'core')} for {count(local_world_size(), 'process', 'es')} with "
        f"{count(workers, 'loader worker')} each; {file_size(memory)} of memory"
        + (f" and {file_size(free)} of /dev/shm" if free is not None else "")
        + f" available, {file_size(shared_bytes)} needed to share with workers"
    )
    limit = free if free is not None and worker_context() != "fork" else memory
    if workers and shared_bytes > limit:
        raise UserError(f"too little for {count(workers, 'loader worker')}: {text}; use fewer --workers")
    return text


def check_disk(run: Trainer, tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Whether the newest checkpoints, the best, the one being written and the best weights fit on the disk.

    Raises:
        UserError: if they do not.
    """
    group_bytes = {name: sum(tensor.nbytes for tensor in group.values()) for name, group in tensors.items()}
    folder, num_checkpoints = run.folder.nearest_existing(), run.options.keep_checkpoints + 2
    existing = sum(file.stat().st_size for file in run.folder.checkpoints.rglob("*") if file.is_file())
    needed = num_checkpoints * sum(group_bytes.values()) + 2 * group_bytes["model"] - existing
    free = shutil.disk_usage(folder).free
    text = (
        f"{file_size(free)} free, {file_size(max(needed, 0))} to be written: {num_checkpoints} checkpoints, the best "
        "weights"
    )
    if needed > free:
        raise UserError(f"{folder} has too little space: {text}; free some, or choose fewer --keep-checkpoints")
    return text


def smoke_test(run: Trainer) -> str:
    """A training step and an evaluation batch on generated images, by the run's own path.

    From its second step on, DistributedDataParallel sends gradients in the order in which they became ready in the
    first. Sums of four or more processes are rounded otherwise in another order: so this must come before a resumed
    run's first step as before a new one's.

    Raises:
        UserError: if the step fails in a way that other settings avoid.
    """
    recipe, on_cpu = run.recipe, run.device.type == "cpu"
    part_size = run.schedule.per_device_batch_size
    if on_cpu:
        part_size = min(part_size, CPU_SMOKE_TEST_IMAGES)
    num_images = part_size * run.schedule.gradient_accumulation_steps
    shape = (num_images, 3, recipe.image_size, recipe.image_size)
    generator = rng.generator(recipe.seed, Stream.AUGMENT, 0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(num_images) % len(run.train_source.class_names)
    start_seconds = time.monotonic()
    try:
        batch = Batch(images, labels, labels, step=0)
        (prefetched,) = prefetch_to_device([batch], run.device, run.augmentation.prepare)
        loss = run.train_step(*prefetched.tensors(), lr_at(1, run.schedule)).item()
    except ValueError as error:  # a norm over a single value
        raise UserError(
            f"a step of {count(part_size, 'image')} of {recipe.image_size} px on each device failed ({error}); "
            "use a larger --global-batch-size or --image-size"
        ) from None
    if not math.isfinite(loss):
        raise UserError(f"the loss of a first step is {loss}; try --precision fp32")
    num_eval_images = 1 if on_cpu else EVAL_BATCH_SIZE
    eval_images = torch.zeros(num_eval_images, 3, recipe.eval_size, recipe.eval_size, dtype=torch.uint8)
    with torch.inference_mode(), reproducible_float32(), translate_memory_errors(num_eval_images):
        run.eval_model.eval()(normalize(eval_images.to(run.device)))
    return f"forward and backward of {count(num_images, 'image')} in {time.monotonic() - start_seconds:.1f} s"


def save_load_compare(run: Trainer, tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Save these tensors as a checkpoint where the run will, load it, and compare all tensors.

    The run holds others before, or the comparison could not fail; afterwards it holds these.

    Raises:
        UserError: if what is loaded is not what was saved.
    """
    start_seconds, folder = time.monotonic(), run.folder.nearest_existing()
    with tempfile.TemporaryDirectory(dir=folder, prefix=files.TEMPORARY_FOLDER) as temporary:
        state = TrainState(step=1, grad_scaler=run.train_step.scaler_state())
        load_checkpoint(save_checkpoint(Path(temporary), state, tensors), run.groups, recipe_sha256="")
    for name, group in run.groups.items():
        if save(group.tensors()) != save(dict(tensors[name])):  # as bytes: NaN equals NaN
            raise UserError(f"what was saved in {folder} is not what was loaded from it; choose another --output-dir")
    return f"saved, loaded and found the same in {time.monotonic() - start_seconds:.1f} s"
