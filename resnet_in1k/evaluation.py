"""How good are these weights? Every image once, in float32, counted in integers."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from resnet_in1k import files
from resnet_in1k.augment import normalise
from resnet_in1k.console import Console
from resnet_in1k.devices import choose_cpu_threads, choose_workers, make_accelerator
from resnet_in1k.errors import UserError
from resnet_in1k.model import load_model, weights_file
from resnet_in1k.pipeline import Batch, eval_loader, on_device, worker_deaths_explained
from resnet_in1k.recipes import resize_size_for
from resnet_in1k.run_folder import find_run, read_recipe
from resnet_in1k.sources import Source, Split, check_same_classes, open_source

EVAL_BATCH_SIZE = 128
"""Images per process and forward; the result does not depend on it."""
NO_CLASS = -1
"""The verdict on an image that cannot be read: always wrong."""


@dataclass(frozen=True)
class Evaluation:
    """Counts over one split, and under which conditions they were counted."""

    num_images: int
    """How many were counted."""
    num_images_in_split: int
    num_classes: int
    top_k: int
    """5, or the number of classes where there are fewer."""
    top1_correct: int
    topk_correct: int
    loss: float
    """Mean cross entropy without label smoothing."""
    image_size: int
    resize_size: int
    data: str
    split: str
    bad_images: dict[str, str] = field(default_factory=dict)
    """Those that no decoder can read, with its reasons: counted as wrong, and with no part in the loss."""

    @property
    def top1_accuracy(self) -> float:
        return self.top1_correct / self.num_images

    @property
    def top5_accuracy(self) -> float:
        """Top-k accuracy; k is `top_k`."""
        return self.topk_correct / self.num_images

    def summary(self) -> str:
        return (
            f"top-1 {self.top1_accuracy:.2%}   top-{self.top_k} {self.top5_accuracy:.2%}   "
            f"{self.split} loss {self.loss:.4f}   {self.num_images:,} of {self.num_images_in_split:,} images"
            + (f", {len(self.bad_images):,} of them unreadable, counted as wrong" if self.bad_images else "")
        )

    def to_json(self, weights_sha256: str) -> dict[str, Any]:
        """eval.json: accuracies as fractions, measured on exactly the weights with that sha256."""
        return {
            "top1_accuracy": self.top1_accuracy,
            "top5_accuracy": self.top5_accuracy,
            "loss": self.loss,
            "num_images": self.num_images,
            "num_bad_images": len(self.bad_images),
            "num_classes": self.num_classes,
            "top1_correct": self.top1_correct,
            "top5_correct": self.topk_correct,
            "top_k": self.top_k,
            "image_size": self.image_size,
            "resize_size": self.resize_size,
            "data": self.data,
            "split": self.split,
            "weights_sha256": weights_sha256,
        }


def evaluate_model(
    model: torch.nn.Module,
    source: Source,
    accelerator: Accelerator,
    *,
    image_size: int,
    resize_size: int,
    num_workers: int,
    batch_size: int = EVAL_BATCH_SIZE,
    stop_asked: Callable[[int], str] = lambda count: "",
) -> Evaluation | str:
    """Evaluate a plain (not a prepared) model; all processes share the work and get the same result.

    `stop_asked` is asked with the number of batches done; if it answers, evaluation stops, and that answer is returned.

    Computes in float32 (TF32 on GPUs) whatever the training's precision, so that an image's verdict does not hang on
    the batch it came in. An image that no decoder can read counts as wrong: leaving it out would flatter the weights.

    Raises:
        UserError: if the loss is not finite.
        ProcessError: if a file cannot be read from its disk.
    """
    num_classes = len(source.class_names)
    loader = eval_loader(
        source,
        image_size=image_size,
        resize_size=resize_size,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    model.eval()
    console = Console(accelerator.is_main_process)
    mine: list[dict[str, torch.Tensor]] = []
    bad_images: dict[int, str] = {}

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        bad_images.update(batch.bad_images)
        return normalise(batch.images), batch.labels, batch.indices

    with (
        torch.inference_mode(),
        _one_algorithm_for_any_batch(),
        console.bar(len(loader), f"evaluate {source.split}") as bar,
    ):
        # All processes must ask equally often: as often as the one with the fewest images can.
        num_common_batches = -(-(len(source) // accelerator.num_processes) // batch_size)
        for number, take in enumerate(on_device(loader, accelerator.device, prepare)):
            if number < num_common_batches and (answer := stop_asked(number)):
                return answer
            images, labels, indices = take()
            logits = model(images)  # (B, C) float32
            mine.append(
                {
                    "indices": indices,
                    "labels": labels,
                    "top_ids": logits.topk(min(5, num_classes)).indices,
                    "losses": torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
                }
            )
            bar.update()

    # One transfer for the whole split: the only point where the host waits for the device.
    rows = {name: torch.cat([part[name] for part in mine]).cpu().numpy() for name in mine[0]} if mine else None
    everyone: list[tuple[dict[str, np.ndarray] | None, dict[int, str]]] = gather_object([(rows, bad_images)])
    results: list[Any] = [None]
    if accelerator.is_main_process:
        gathered = [part for part, _ in everyone if part is not None]
        bad = {index: reason for _, found in everyone for index, reason in found.items()}
        results = [
            _count({name: np.concatenate([part[name] for part in gathered]) for name in gathered[0]}, bad, source)
        ]
    counts = broadcast_object_list(results)[0]
    if len(counts["bad_images"]) == len(source):
        name, reason = next(iter(counts["bad_images"].items()))
        raise UserError(f"no image of {source.name}/{source.split} can be read: {name} ({reason}) and all others")
    if not math.isfinite(counts["loss"]):
        raise UserError(f"the loss on {source.name}/{source.split} is {counts['loss']}: these weights have diverged")
    return Evaluation(
        num_images_in_split=len(source),
        num_classes=num_classes,
        **counts,
        image_size=image_size,
        resize_size=resize_size,
        data=source.name,
        split=source.split,
    )


@contextlib.contextmanager
def _one_algorithm_for_any_batch() -> Iterator[None]:
    """cuDNN would else choose by the batch's size and the moment, and an image's verdict would hang on its company."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _count(rows: dict[str, np.ndarray], bad_images: dict[int, str], source: Source) -> dict[str, Any]:
    """From all processes' rows, in whatever order they came, to counts."""
    from resnet_in1k.metrics import TopKAccuracy  # seconds to import, and only the main process needs it

    order = np.argsort(rows["indices"])
    assert np.array_equal(rows["indices"][order], np.arange(len(source))), "each image exactly once"
    assert np.array_equal(rows["labels"][order], source.labels)

    bad = sorted(bad_images)
    losses = np.delete(rows["losses"][order].astype(np.float64), bad)
    rows["top_ids"][np.isin(rows["indices"], bad)] = NO_CLASS
    top_k = rows["top_ids"].shape[1]
    metric = TopKAccuracy(k=top_k)
    metric.add_batch(predictions=rows["top_ids"][order], references=rows["labels"][order])
    counts = metric.compute()
    return {
        "num_images": counts["num_images"],
        "top_k": top_k,
        "top1_correct": counts["top1_correct"],
        "topk_correct": counts["topk_correct"],
        "loss": float(losses.mean()) if len(losses) else math.nan,
        "bad_images": {source.image_name(index): bad_images[index] for index in bad},
    }


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, on what."""

    ckpt: Path
    """A run folder, a checkpoint folder, a .safetensors file, or an old .pth state dict."""
    data: str | None = None
    """As for training; by default what the run was trained on."""
    split: Split = "val"
    """Which split of the data."""
    image_size: int | None = None
    """Side of the centre crop, in pixels; by default the run's."""
    eval_crop_ratio: float | None = None
    """The short side is resized to image_size / this before the crop; by default the run's."""
    output: Path | None = None
    """Write the result to this file, as eval.json in a run folder."""
    batch_size: int = EVAL_BATCH_SIZE
    """Images per process and forward; the counts do not depend on it."""
    workers: int | None = None
    """Loader workers per process; by default from the number of CPU cores."""
    cpu_threads: int | None = None
    """Threads for computing on the CPU, per process; by default all physical cores, shared among the processes."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: at least 1")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size {self.image_size}: at least 1")
        if self.eval_crop_ratio is not None and not 0 < self.eval_crop_ratio <= 1:
            raise UserError(f"--eval-crop-ratio {self.eval_crop_ratio}: above 0, at most 1")


def evaluate_checkpoint(options: EvalOptions) -> Evaluation:
    """Evaluate saved weights; what the options leave open is as the run recorded it.

    Raises:
        UserError: if there are no weights or no data, if the classes of the two differ, or for weights outside a run
            folder if `data` is not given.
    """
    file = weights_file(options.ckpt)
    run = find_run(options.ckpt)
    data, image_size, crop_ratio = options.data, options.image_size, options.eval_crop_ratio
    if run is not None:
        recipe, facts = read_recipe(run)
        data = data or facts["data"]["source"]
        image_size, crop_ratio = image_size or recipe.image_size, crop_ratio or recipe.eval_crop_ratio
    if data is None:
        raise UserError(
            f"{options.ckpt} does not lie in a run folder, so nothing says what to evaluate it on; give --data"
        )
    image_size, crop_ratio = image_size or 224, crop_ratio or 0.875
    if options.output is not None and not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: no folder {options.output.parent}")

    model = load_model(file)
    source = open_source(data, options.split)
    if run is not None:
        check_same_classes(facts["data"]["class_names"], "the run", source.class_names, data, where=str(options.ckpt))
    elif len(source.class_names) != model.fc.out_features:
        raise UserError(
            f"{file} knows {model.fc.out_features} classes, but {data} has {len(source.class_names)}: "
            "these are not the data it was trained for"
        )

    accelerator = make_accelerator("fp32")
    choose_cpu_threads(accelerator.device, options.cpu_threads)
    console = Console(accelerator.is_main_process)
    resize_size = resize_size_for(image_size, crop_ratio)
    console.say(
        f"{file}: {model.architecture}, {model.fc.out_features} classes\n"
        f"{data}/{options.split}: {len(source):,} images, resized to {resize_size} px, centre {image_size} px cropped"
    )
    with worker_deaths_explained():
        evaluation = evaluate_model(
            model.to(accelerator.device, memory_format=torch.channels_last),
            source,
            accelerator,
            image_size=image_size,
            resize_size=resize_size,
            num_workers=choose_workers(accelerator.device, options.workers),
            batch_size=options.batch_size,
        )
    assert isinstance(evaluation, Evaluation), "nobody asked it to stop"
    console.say(evaluation.summary())
    for name, reason in evaluation.bad_images.items():
        console.say(f"counted as wrong: {name} ({reason})")
    if len(source.class_names) < 5:
        console.say(f"fewer than five classes: top-{evaluation.top_k} stands in for top-5")
    if options.output is not None and accelerator.is_main_process:
        files.write_json(options.output, evaluation.to_json(files.sha256_of(file)))
        console.say(f"written to {options.output}")
    accelerator.end_training()
    return evaluation
