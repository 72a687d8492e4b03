"""The accuracy of a model on one split: each image once, in float32, counted in integers."""

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.dataset import Source, samples_sha256
from resnet_in1k.data.decode import IfBad
from resnet_in1k.data.loader import Batch, Loader, prefetch_to_device
from resnet_in1k.data.sampler import EvalSampler
from resnet_in1k.evaluate.metrics import top_k_counts
from resnet_in1k.recipes.recipe import PublishedWeights
from resnet_in1k.utils.console import Console
from resnet_in1k.utils.device import reproducible_float32, translate_memory_errors
from resnet_in1k.utils.errors import UserError

EVAL_BATCH_SIZE = 128
"""Images per process and forward pass. A different batch size, number of processes or type of device changes logits by
float32 rounding, about 1e-6 relative, so counts change only for images with two classes that close."""
SAMPLED_IMAGES = 64
"""Number of images hashed into `samples_sha256` of eval.json."""
NO_CLASS = -1
"""Predicted class of an image that cannot be read; never equal to a label."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for N images, in the order of the source."""

    labels: np.ndarray
    """(N,) int64: true classes."""
    top_ids: np.ndarray
    """(N, k) int64: the k most probable classes, best first; NO_CLASS where the image cannot be read."""
    confidences: np.ndarray
    """(N,) float32: probability of the most probable class."""


@dataclass(frozen=True)
class Evaluation:
    """Counts over one split, and the conditions of the evaluation."""

    num_images: int
    num_classes: int
    top_k: int  # 5, or the number of classes if there are fewer
    top1_correct: int
    topk_correct: int
    loss: float
    """Mean cross entropy without label smoothing."""
    preprocessing: EvalPreprocessing
    data: str
    split: str
    weights: PublishedWeights = "model"
    """Weights of a training run that were evaluated: the model's own or their moving average."""
    class_names: tuple[str, ...] = ()
    class_num_images: tuple[int, ...] = ()  # in the order of class_names, as the next two
    class_top1_correct: tuple[int, ...] = ()
    class_topk_correct: tuple[int, ...] = ()
    bad_images: dict[str, str] = field(default_factory=dict)
    """Decoder's error by image name; these images count as wrong and are not part of the loss."""
    images_sha256: str = ""
    """The source's fingerprint."""
    samples_sha256: str = ""
    """Hash of the content of SAMPLED_IMAGES images: resized copies have the same names as their originals."""
    predictions: Predictions | None = field(default=None, compare=False, repr=False)

    @property
    def top1_accuracy(self) -> float:
        return self.top1_correct / self.num_images

    @property
    def top5_accuracy(self) -> float:
        """Top-k accuracy, with k = `top_k`."""
        return self.topk_correct / self.num_images

    def summary(self) -> str:
        bad = f", {len(self.bad_images):,} unreadable, counted as wrong" if self.bad_images else ""
        return (
            f"top-1 {self.top1_accuracy:.2%}   top-{self.top_k} {self.top5_accuracy:.2%}   "
            f"{self.split} loss {self.loss:.4f}   {self.num_images:,} images{bad}"
        )

    def to_json(self, weights_sha256: str) -> dict[str, Any]:
        """Return the content of eval.json; accuracies are fractions, measured on the weights with that sha256."""
        names = (
            *("top1_accuracy", "top5_accuracy", "loss", "num_images", "num_classes", "top1_correct", "top_k", "data"),
            *("split", "weights", "class_names", "class_num_images", "class_top1_correct"),
        )
        content = {name: getattr(self, name) for name in names} | vars(self.preprocessing)
        content |= {"top5_correct": self.topk_correct, "class_top5_correct": self.class_topk_correct}
        content |= {"num_bad_images": len(self.bad_images), "exif_orientation": "applied"}
        content["weights_sha256"] = weights_sha256
        if self.predictions is not None:
            bits = np.packbits(self.predictions.top_ids[:, 0] == self.predictions.labels)  # one bit per image
            content |= {"images_sha256": self.images_sha256, "samples_sha256": self.samples_sha256}
            content["top1_right"] = base64.b64encode(bits).decode("ascii")
        return content


def eval_loader(
    source: Source, preprocessing: EvalPreprocessing, batch_size: int, num_workers: int, if_bad: IfBad = "blank"
) -> Loader:
    """Return a loader for `evaluate_model`; by default an image that cannot be decoded is blank."""
    return Loader(
        source,
        preprocessing.crop_all,
        batch_size=batch_size,
        largest_image_size=preprocessing.image_size,
        num_workers=num_workers,
        if_bad=if_bad,
    )


def evaluate_model(
    model: torch.nn.Module,
    source: Source,
    loader: Loader,
    accelerator: Accelerator,
    preprocessing: EvalPreprocessing,
    stop_if_requested: Callable[[int], None] = lambda batches_done: None,
) -> Evaluation:
    """Evaluate a plain model, one without Accelerate's wrappers; all processes share the work and return the same.

    The same weights give the same bits on the same machine with the same libraries and batch size; see EVAL_BATCH_SIZE
    for the rest. An image that no decoder can read counts as wrong, as leaving it out would raise the accuracy.

    Args:
        loader: made by `eval_loader` for `source` and the same preprocessing.
        stop_if_requested: called with the number of batches done, equally often on all processes; it may raise.

    Raises:
        UserError: if the loss is not finite, or no image can be decoded.
        ProcessError: if a file cannot be read from its disk, or a batch does not fit into memory.
    """
    rank, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    order = EvalSampler(len(source), loader.batch_size, preprocessing.image_size, rank, num_processes)
    # Process r has every num_processes-th image, so some processes may have one batch more than the others.
    num_common_batches = -(-(len(source) // num_processes) // loader.batch_size)
    # A GPU's libraries choose an algorithm by batch size, and each rounds differently: there the last batch is padded,
    # so that a prediction does not depend on its batch. On a CPU padding would cost as much time as more images.
    pad_to = loader.batch_size if device.type != "cpu" else 0
    model.eval()
    outputs: list[dict[str, Tensor]] = []
    bad_images: dict[int, str] = {}

    def prepare(batch: Batch) -> tuple[Tensor, ...]:
        images = normalize(padded(batch.images, pad_to), preprocessing.mean, preprocessing.std)
        return images, batch.labels, batch.indices

    bar = Console(accelerator.is_main_process).bar(len(order), f"evaluate {source.split}")
    forward_size = max(pad_to, min(loader.batch_size, len(source)))
    with translate_memory_errors(forward_size), torch.inference_mode(), reproducible_float32(), bar:
        for number, (bad, take) in enumerate(prefetch_to_device(loader.batches(order), device, prepare)):
            if number < num_common_batches:
                stop_if_requested(number)
            bad_images.update(bad)
            outputs.append(predict_batch(model, *take()))
            bar.update()
        # One transfer for all batches: the only point where the host waits for the device.
        arrays = {name: torch.cat([each[name] for each in outputs]).cpu().numpy() for name in (outputs or [{}])[0]}
    return _evaluation(gather_object([(arrays, bad_images)]), source, preprocessing)


def padded(images: Tensor, batch_size: int) -> Tensor:
    """Append black images to (B, …), if there are fewer than `batch_size`."""
    missing = batch_size - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing > 0 else images


def predict_batch(model: torch.nn.Module, images: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """Predict one batch on its device, by a model in eval mode; the host does not wait for the device.

    Args:
        images: (P, 3, S, S) float32, normalized; images after the first B are padding.
        labels: (B,) int64, as are `indices`, the images' positions in the source.

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


def _evaluation(shares: list[tuple[dict, dict]], source: Source, preprocessing: EvalPreprocessing) -> Evaluation:
    """Merge all processes' arrays by name and bad images' reasons by index, and count."""
    arrays = [arrays for arrays, _ in shares if arrays]  # a process may have had no image
    rows = {name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]}
    order = np.argsort(rows["indices"])
    rows = {name: values[order] for name, values in rows.items()}
    assert np.array_equal(rows["indices"], np.arange(len(source))), "each image exactly once"
    assert np.array_equal(rows["labels"], source.labels)

    reasons = {index: reason for _, found in shares for index, reason in found.items()}
    bad = sorted(reasons)
    where = f"{source.name}/{source.split}"
    if len(bad) == len(source):
        raise UserError(f"no image of {where} can be read: {source.image_name(0)} ({reasons[0]})")
    rows["top_ids"][bad], rows["confidences"][bad] = NO_CLASS, 0.0
    loss = float(np.delete(rows["losses"].astype(np.float64), bad).mean())
    if not np.isfinite(loss):
        raise UserError(f"the loss on {where} is {loss}: these weights have diverged")
    return Evaluation(
        **top_k_counts(rows["top_ids"], rows["labels"], len(source.class_names)),
        num_classes=len(source.class_names),
        top_k=rows["top_ids"].shape[1],
        loss=loss,
        preprocessing=preprocessing,
        data=source.name,
        split=source.split,
        class_names=source.class_names,
        bad_images={source.image_name(index): reasons[index] for index in bad},
        images_sha256=source.fingerprint(),
        samples_sha256=samples_sha256(source, SAMPLED_IMAGES),
        predictions=Predictions(rows["labels"], rows["top_ids"], rows["confidences"]),
    )
