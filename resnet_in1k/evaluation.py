"""How good are these weights? Every image once, in float32, counted in integers."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from resnet_in1k.augment import normalise
from resnet_in1k.console import Console
from resnet_in1k.devices import inference_memory_explained
from resnet_in1k.errors import UserError
from resnet_in1k.pipeline import Batch, Loader, eval_loader, on_device
from resnet_in1k.sources import Source

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
    class_names: tuple[str, ...] = ()
    class_num_images: tuple[int, ...] = ()
    """Of each class, how many images were counted; so for the two below."""
    class_top1_correct: tuple[int, ...] = ()
    class_topk_correct: tuple[int, ...] = ()
    bad_images: dict[str, str] = field(default_factory=dict)
    """Those that no decoder can read, with its reasons: counted as wrong, and with no part in the loss."""
    verdicts: "Verdicts | None" = field(default=None, compare=False, repr=False)
    """Image by image, on the main process."""

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
            "class_names": self.class_names,
            "class_num_images": self.class_num_images,
            "class_top1_correct": self.class_top1_correct,
            "class_top5_correct": self.class_topk_correct,
        }


@dataclass(frozen=True)
class Verdicts:
    """What was said of each image, in the order of the source."""

    labels: np.ndarray
    """(N,) int64: the true classes."""
    top_ids: np.ndarray
    """(N, k) int64: the k most probable classes, best first; NO_CLASS where the image cannot be read."""
    confidences: np.ndarray
    """(N,) float32: the probability of the first of them."""


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
        ProcessError: if a file cannot be read from its disk, or a batch does not fit into memory.
    """
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
    # All processes must ask equally often: as often as the one with the fewest images can.
    num_common_batches = -(-(len(source) // accelerator.num_processes) // batch_size)
    with inference_memory_explained(min(batch_size, len(source))):
        share = _judge(
            model,
            loader,
            accelerator,
            bar_label=f"evaluate {source.split}",
            stop_asked=lambda number: stop_asked(number) if number < num_common_batches else "",
        )
    if isinstance(share, str):
        return share
    everyone: list[Share] = gather_object([share])
    results: list[Any] = [None]
    verdicts = None
    if accelerator.is_main_process:
        gathered = [part for part, _ in everyone if part is not None]
        bad = {index: reason for _, found in everyone for index, reason in found.items()}
        rows = {name: np.concatenate([part[name] for part in gathered]) for name in gathered[0]}
        verdicts, counts = _count(rows, bad, source)
        results = [counts]
    counts = broadcast_object_list(results)[0]
    if len(counts["bad_images"]) == len(source):
        name, reason = next(iter(counts["bad_images"].items()))
        raise UserError(f"no image of {source.name}/{source.split} can be read: {name} ({reason}) and all others")
    if not math.isfinite(counts["loss"]):
        raise UserError(f"the loss on {source.name}/{source.split} is {counts['loss']}: these weights have diverged")
    return Evaluation(
        num_images_in_split=len(source),
        num_classes=len(source.class_names),
        **counts,
        image_size=image_size,
        resize_size=resize_size,
        data=source.name,
        split=source.split,
        class_names=source.class_names,
        verdicts=verdicts,
    )


Share = tuple[dict[str, np.ndarray] | None, dict[int, str]]
"""What one process has judged: rows by name, None if it had no image; and the decoder's reasons, by place."""


def _judge(
    model: torch.nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    *,
    bar_label: str,
    stop_asked: Callable[[int], str],
) -> Share | str:
    """This process's images through the model; or the answer, if it was asked to stop."""
    model.eval()
    console = Console(accelerator.is_main_process)
    mine: list[dict[str, torch.Tensor]] = []
    bad_images: dict[int, str] = {}

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        bad_images.update(batch.bad_images)
        return normalise(batch.images), batch.labels, batch.indices

    with torch.inference_mode(), _one_algorithm_for_any_batch(), console.bar(len(loader), bar_label) as bar:
        for number, take in enumerate(on_device(loader, accelerator.device, prepare)):
            if answer := stop_asked(number):
                return answer
            images, labels, indices = take()
            logits = model(images)  # (B, C) float32
            top = logits.topk(min(5, logits.shape[1]))
            mine.append(
                {
                    "indices": indices,
                    "labels": labels,
                    "top_ids": top.indices,
                    "confidences": (top.values[:, 0] - logits.logsumexp(dim=1)).exp(),
                    "losses": torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
                }
            )
            bar.update()

    # One transfer for the whole split: the only point where the host waits for the device.
    rows = {name: torch.cat([part[name] for part in mine]).cpu().numpy() for name in mine[0]} if mine else None
    return rows, bad_images


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


def _count(rows: dict[str, np.ndarray], bad_images: dict[int, str], source: Source) -> tuple[Verdicts, dict[str, Any]]:
    """From all processes' rows, in whatever order they came, to counts."""
    from resnet_in1k.metrics import TopKAccuracy  # seconds to import, and only the main process needs it

    order = np.argsort(rows["indices"])
    rows = {name: values[order] for name, values in rows.items()}
    assert np.array_equal(rows["indices"], np.arange(len(source))), "each image exactly once"
    assert np.array_equal(rows["labels"], source.labels)

    bad = sorted(bad_images)
    losses = np.delete(rows["losses"].astype(np.float64), bad)
    rows["top_ids"][bad], rows["confidences"][bad] = NO_CLASS, 0.0
    verdicts = Verdicts(rows["labels"], rows["top_ids"], rows["confidences"])
    top_k = rows["top_ids"].shape[1]
    metric = TopKAccuracy(k=top_k)
    metric.add_batch(predictions=verdicts.top_ids, references=verdicts.labels)
    counts = metric.compute()
    hits = verdicts.top_ids == verdicts.labels[:, None]

    def by_class(chosen: np.ndarray) -> tuple[int, ...]:
        return tuple(np.bincount(verdicts.labels[chosen], minlength=len(source.class_names)).tolist())

    return verdicts, {
        "num_images": counts["num_images"],
        "top_k": top_k,
        "top1_correct": counts["top1_correct"],
        "topk_correct": counts["topk_correct"],
        "loss": float(losses.mean()) if len(losses) else math.nan,
        "class_num_images": by_class(np.ones(len(source), dtype=bool)),
        "class_top1_correct": by_class(hits[:, 0]),
        "class_topk_correct": by_class(hits.any(axis=1)),
        "bad_images": {source.image_name(index): bad_images[index] for index in bad},
    }
