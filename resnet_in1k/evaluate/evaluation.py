"""The accuracy of a model on one split: every image once, in float32, counted in integers."""

import base64
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.dataset import Source, samples_sha256
from resnet_in1k.data.loader import Batch, Loader, prefetch_to_device
from resnet_in1k.data.sampler import EvalSampler
from resnet_in1k.recipes.recipe import PublishedWeights
from resnet_in1k.utils.console import Console
from resnet_in1k.utils.device import reproducible_float32, translate_memory_errors
from resnet_in1k.utils.errors import UserError

EVAL_BATCH_SIZE = 128
"""Images per process and forward pass. Another number, as another number of processes or kind of device, moves logits
by float32's rounding at most, about 1e-6 of them, and so the counts only by images whose classes are that close."""
SAMPLED_IMAGES = 64
"""Whose content eval.json has a sum of."""
NO_CLASS = -1
"""Predicted for an image that cannot be read: always wrong."""


@dataclass(frozen=True)
class Evaluation:
    """Counts over one split, and under which conditions they were counted."""

    num_images: int
    num_classes: int
    top_k: int
    """5, or the number of classes where there are fewer."""
    top1_correct: int
    topk_correct: int
    loss: float
    """Mean cross entropy without label smoothing."""
    preprocessing: EvalPreprocessing
    data: str
    split: str
    weights: PublishedWeights = "model"
    """Of a training run: the model's own weights or their moving average."""
    class_names: tuple[str, ...] = ()
    class_num_images: tuple[int, ...] = ()
    """Of each class, how many images were counted; so for the two below."""
    class_top1_correct: tuple[int, ...] = ()
    class_topk_correct: tuple[int, ...] = ()
    bad_images: dict[str, str] = field(default_factory=dict)
    """Those that no decoder can read, with its reasons: counted as wrong, and not part of the loss."""
    images_sha256: str = ""
    """The source's fingerprint."""
    samples_sha256: str = ""
    """Of the content of SAMPLED_IMAGES of them: resized copies have the names of their originals."""
    predictions: "Predictions | None" = field(default=None, compare=False, repr=False)
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
            f"{self.split} loss {self.loss:.4f}   {self.num_images:,} images"
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
            "image_size": self.preprocessing.image_size,
            "resize_size": self.preprocessing.resize_size,
            "interpolation": self.preprocessing.interpolation,
            "mean": self.preprocessing.mean,
            "std": self.preprocessing.std,
            "exif_orientation": "applied",
            "data": self.data,
            "split": self.split,
            "weights": self.weights,
            "weights_sha256": weights_sha256,
            "class_names": self.class_names,
            "class_num_images": self.class_num_images,
            "class_top1_correct": self.class_top1_correct,
            "class_top5_correct": self.class_topk_correct,
            **self._image_by_image(),
        }

    def _image_by_image(self) -> dict[str, str]:
        """On the main process: which images they were, and a bit for each, whether it was right."""
        if self.predictions is None:
            return {}
        is_right = self.predictions.top_ids[:, 0] == self.predictions.labels
        bits = base64.b64encode(np.packbits(is_right)).decode("ascii")
        return {"images_sha256": self.images_sha256, "samples_sha256": self.samples_sha256, "top1_right": bits}


@dataclass(frozen=True)
class Predictions:
    """What was predicted for each image, in the order of the source."""

    labels: np.ndarray
    """(N,) int64: the true classes."""
    top_ids: np.ndarray
    """(N, k) int64: the k most probable classes, best first; NO_CLASS where the image cannot be read."""
    confidences: np.ndarray
    """(N,) float32: the probability of the first of them."""


def eval_loader(source: Source, preprocessing: EvalPreprocessing, batch_size: int, num_workers: int) -> Loader:
    """A loader for `evaluate_model`; an image that cannot be decoded is blank."""
    return Loader(
        source,
        preprocessing.crop,
        batch_size=batch_size,
        largest_image_size=preprocessing.image_size,
        num_workers=num_workers,
        if_bad="blank",
    )


def evaluate_model(
    model: torch.nn.Module,
    source: Source,
    loader: Loader,
    accelerator: Accelerator,
    preprocessing: EvalPreprocessing,
    stop_if_requested: Callable[[int], None] = lambda batches_done: None,
) -> Evaluation:
    """Evaluate a plain (not a prepared) model; all processes share the work and get the same result.

    Computes in float32 without TF32, and on a GPU pads the last batch. So what is promised: with the same machine,
    libraries and batch size the same weights give the same bits, and an image's prediction does not depend on the
    others in its batch. What other numbers of processes or images per batch can change is said at EVAL_BATCH_SIZE. An
    image that no decoder can read counts as wrong: to leave it out would raise the accuracy.

    Args:
        loader: of `source`, made by `eval_loader` with the same preprocessing.
        stop_if_requested: called with the number of batches done, equally often on all processes; it may raise.

    Raises:
        UserError: if the loss is not finite, or no image can be decoded.
        ProcessError: if a file cannot be read from its disk, or a batch does not fit into memory.
    """
    order = EvalSampler(
        num_images=len(source),
        batch_size=loader.batch_size,
        image_size=preprocessing.image_size,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    # As often as the process with the fewest images can.
    num_common_batches = -(-(len(source) // accelerator.num_processes) // loader.batch_size)
    bar = Console(accelerator.is_main_process).bar(len(order), f"evaluate {source.split}")
    pad_to = loader.batch_size if pads_batches(accelerator.device) else 0

    def ask_to_stop(number: int) -> None:
        if number < num_common_batches:
            stop_if_requested(number)

    with translate_memory_errors(max(pad_to, min(loader.batch_size, len(source)))):
        share = _predict(model, loader.batches(order), preprocessing, pad_to, accelerator, bar, ask_to_stop)
    everyone: list[Share] = gather_object([share])
    counts: list[Any] = [None]
    predictions = None
    if accelerator.is_main_process:
        predictions, counted = _count(everyone, source)
        counts = [counted]
    counted = broadcast_object_list(counts)[0]
    _check_usable(counted, source)
    return Evaluation(
        num_classes=len(source.class_names),
        **counted,
        preprocessing=preprocessing,
        data=source.name,
        split=source.split,
        class_names=source.class_names,
        images_sha256=source.fingerprint(),
        samples_sha256=samples_sha256(source, SAMPLED_IMAGES),
        predictions=predictions,
    )


Share = tuple[dict[str, np.ndarray], dict[int, str]]
"""What one process has predicted: arrays by name, empty if it had no image; and its bad images' reasons, by index."""


def pads_batches(device: torch.device) -> bool:
    """Whether to evaluate full batches only.

    A GPU's libraries choose an algorithm by the batch's size, and each rounds in its own way. On a CPU, where other
    images in a batch cost as much time again, the last batch stays as it is.
    """
    return device.type != "cpu"


def _predict(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    preprocessing: EvalPreprocessing,
    pad_to: int,
    accelerator: Accelerator,
    bar: Any,
    stop_if_requested: Callable[[int], None],
) -> Share:
    """This process's images through the model, in batches of `pad_to` or more."""
    model.eval()
    parts: list[dict[str, torch.Tensor]] = []
    bad_images: dict[int, str] = {}

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        images = normalize(padded(batch.images, pad_to), preprocessing.mean, preprocessing.std)
        return images, batch.labels, batch.indices

    with torch.inference_mode(), reproducible_float32(), bar:
        for number, prefetched in enumerate(prefetch_to_device(batches, accelerator.device, prepare)):
            stop_if_requested(number)
            bad_images.update(prefetched.bad_images)
            parts.append(predict_batch(model, *prefetched.tensors()))
            bar.update()

    # One transfer for the whole split: the only point where the host waits for the device.
    arrays = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]} if parts else {}
    return arrays, bad_images


def padded(images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """(B, …) with black images at the end, if there are fewer than `batch_size`."""
    missing = batch_size - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing > 0 else images


def predict_batch(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What is kept of a batch, on its device; the host does not wait for it.

    Args:
        model: in eval mode.
        images: (P, 3, S, S) float32, normalized; those after the first B are padding.
        labels: (B,) int64; so are `indices`, the images' positions in the source.

    Returns:
        `indices`, `labels`, `top_ids` (B, k) int64, `confidences` and `losses` (B,) float32.
    """
    logits = model(images)[: len(labels)]  # (B, C) float32
    top = logits.topk(min(5, logits.shape[1]))
    return {
        "indices": indices,
        "labels": labels,
        "top_ids": top.indices,
        "confidences": (top.values[:, 0] - logits.logsumexp(dim=1)).exp(),
        "losses": torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
    }


def _count(shares: list[Share], source: Source) -> tuple[Predictions, dict[str, Any]]:
    """From all processes' predictions to counts."""
    from resnet_in1k.evaluate.metrics import TopKAccuracy  # seconds to import, and only the main process needs it

    arrays = [arrays for arrays, _ in shares if arrays]
    rows = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    order = np.argsort(rows["indices"])
    rows = {name: values[order] for name, values in rows.items()}
    assert np.array_equal(rows["indices"], np.arange(len(source))), "each image exactly once"
    assert np.array_equal(rows["labels"], source.labels)

    reasons = {index: reason for _, found in shares for index, reason in found.items()}
    bad = sorted(reasons)
    losses = np.delete(rows["losses"].astype(np.float64), bad)
    rows["top_ids"][bad], rows["confidences"][bad] = NO_CLASS, 0.0
    top_k = rows["top_ids"].shape[1]
    metric = TopKAccuracy(top_k, len(source.class_names))
    metric.add_batch(predictions=rows["top_ids"], references=rows["labels"])
    counts = metric.compute()
    return Predictions(rows["labels"], rows["top_ids"], rows["confidences"]), {
        "num_images": counts["num_images"],
        "top_k": top_k,
        "top1_correct": counts["top1_correct"],
        "topk_correct": counts["topk_correct"],
        "loss": float(losses.mean()) if len(losses) else math.nan,
        **{f"class_{what}": tuple(counts[f"class_{what}"]) for what in ("num_images", "top1_correct", "topk_correct")},
        "bad_images": {source.image_name(index): reasons[index] for index in bad},
    }


def _check_usable(counted: dict[str, Any], source: Source) -> None:
    if len(counted["bad_images"]) == len(source):
        name, reason = next(iter(counted["bad_images"].items()))
        raise UserError(f"no image of {source.name}/{source.split} can be read: {name} ({reason}) and all others")
    if not math.isfinite(counted["loss"]):
        raise UserError(f"the loss on {source.name}/{source.split} is {counted['loss']}: these weights have diverged")
