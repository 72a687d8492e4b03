"""The accuracy of a model on one split: each image once, in float32, counted in integers."""

import base64
import functools
from collections.abc import Callable
from dataclasses import dataclass
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
from resnet_in1k.data.sampler import eval_specs
from resnet_in1k.evaluate.metrics import top_k_counts
from resnet_in1k.recipes.recipe import PublishedWeights
from resnet_in1k.utils.console import bar_below_lines
from resnet_in1k.utils.device import reproducible_float32
from resnet_in1k.utils.errors import UserError, translate_errors

EVAL_MEMORY_ADVICE = "use a smaller --image-size or, if the command has it, --batch-size"
SAMPLED_IMAGES = 64  # hashed into samples_sha256 of eval.json
NO_CLASS = -1
"""Predicted class of an image that cannot be read; never equal to a label."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions for the N images of a split, in the order of the source, and the conditions of the evaluation."""

    source: Source
    preprocessing: EvalPreprocessing
    top_ids: np.ndarray
    """(N, k) int64: the k most probable classes, best first; NO_CLASS where the image cannot be read."""
    confidences: np.ndarray
    """(N,) float32: probability of the most probable class."""
    loss: float
    """Mean cross entropy without label smoothing."""
    bad_images: dict[str, str]
    """Decoder's error by image name; these images count as wrong and are not part of the loss."""

    @functools.cached_property
    def counts(self) -> dict[str, Any]:
        """Accuracies and counts, see `top_k_counts`."""
        return top_k_counts(self.top_ids, self.source.labels, len(self.source.class_names))

    @property
    def top1_accuracy(self) -> float:
        return self.counts["top1_accuracy"]

    def summary(self) -> str:
        bad = f", {len(self.bad_images):,} unreadable, counted as wrong" if self.bad_images else ""
        return (
            f"top-1 {self.top1_accuracy:.2%}   top-{self.counts['top_k']} {self.counts['top5_accuracy']:.2%}   "
            f"{self.source.split} loss {self.loss:.4f}   {len(self.source):,} images{bad}"
        )

    def to_json(self, weights_sha256: str, weights: PublishedWeights) -> dict[str, Any]:
        """Return the content of eval.json for weights with that sha256, the model's own or their moving average."""
        is_right = self.top_ids[:, 0] == self.source.labels
        return {
            **self.counts,
            "loss": self.loss,
            "num_bad_images": len(self.bad_images),
            "top1_right": base64.b64encode(np.packbits(is_right)).decode("ascii"),  # one bit per image
            "data": self.source.name,
            "split": self.source.split,
            "class_names": self.source.class_names,
            "images_sha256": self.source.fingerprint(),
            # Resized copies have the same names, and so the same fingerprint, as their originals.
            "samples_sha256": samples_sha256(self.source, SAMPLED_IMAGES),
            **vars(self.preprocessing),
            "exif_orientation": "applied",
            "weights": weights,
            "weights_sha256": weights_sha256,
        }


class EvalLoader(Loader):
    """Loader for `evaluate_model`; by default an image that cannot be decoded is blank."""

    def __init__(
        self, source: Source, preprocessing: EvalPreprocessing, batch_size: int, workers: int, if_bad: IfBad = "blank"
    ):
        how = {"batch_size": batch_size, "largest_image_size": preprocessing.image_size, "num_workers": workers}
        super().__init__(source, preprocessing.crop_all, **how, if_bad=if_bad)
        self.source, self.preprocessing = source, preprocessing


def evaluate_model(
    model: torch.nn.Module,
    loader: EvalLoader,
    accelerator: Accelerator,
    stop_if_requested: Callable[[int], None] = lambda batches_done: None,
) -> Evaluation:
    """Evaluate a plain model, one without Accelerate's wrappers; all processes share the work and return the same.

    The same weights give the same bits on the same machine with the same libraries and batch size; see
    EVAL_BATCH_SIZE in recipes/step_counts.py for others. An image that no decoder can read counts as wrong, as leaving
    it out would raise the accuracy.

    Args:
        stop_if_requested: called with the number of batches done, equally often on all processes; it may raise.

    Raises:
        UserError: if the loss is not finite, or no image can be decoded.
        ProcessError: if a file cannot be read from its disk, or a batch does not fit into memory.
    """
    source, preprocessing = loader.source, loader.preprocessing
    rank, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    specs = eval_specs(len(source), loader.batch_size, preprocessing.image_size, rank, num_processes)
    num_batches = -(-len(source) // (num_processes * loader.batch_size))  # of the main process
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

    bar = bar_below_lines(num_batches, f"evaluate {source.split}")
    forward_size = max(pad_to, min(loader.batch_size, len(source)))
    with translate_errors(forward_size, EVAL_MEMORY_ADVICE), torch.inference_mode(), reproducible_float32(), bar:
        for number, (bad, take) in enumerate(prefetch_to_device(loader.batches(specs), device, prepare)):
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
    missing = max(0, batch_size - len(images))
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images


def predict_batch(model: torch.nn.Module, images: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """Predict one batch on its device, by a model in eval mode; the host does not wait for the device.

    Args:
        images: (P, 3, S, S) float32, normalized; images after the first B are padding.
        labels: (B,) int64, as are `indices`, the images' positions in the source.

    Returns:
        `indices`, `top_ids` (B, k) int64, `confidences` and `losses` (B,) float32.
    """
    logits = model(images)[: len(labels)]  # (B, C) float32
    top = logits.topk(min(5, logits.shape[1]))
    return {
        "indices": indices,
        "top_ids": top.indices,
        "confidences": (top.values[:, 0] - logits.logsumexp(dim=1)).exp(),
        "losses": torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
    }


def _evaluation(shares: list[tuple[dict, dict]], source: Source, preprocessing: EvalPreprocessing) -> Evaluation:
    """Merge all processes' arrays by name and bad images' reasons by index, in the order of the source."""
    arrays = [arrays for arrays, _ in shares if arrays]  # a process may have had no image
    rows = {name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]}
    order = np.argsort(rows["indices"])
    top_ids, confidences, losses = (rows[name][order] for name in ("top_ids", "confidences", "losses"))
    assert np.array_equal(rows["indices"][order], np.arange(len(source))), "each image exactly once"

    reasons = {index: reason for _, found in shares for index, reason in found.items()}
    bad = sorted(reasons)
    where = f"{source.name}/{source.split}"
    if len(bad) == len(source):
        raise UserError(f"no image of {where} can be read: {source.image_name(0)} ({reasons[0]})")
    top_ids[bad], confidences[bad] = NO_CLASS, 0.0
    loss = float(np.delete(losses.astype(np.float64), bad).mean())
    if not np.isfinite(loss):
        raise UserError(f"the loss on {where} is {loss}: these weights have diverged")
    bad_images = {source.image_name(index): reasons[index] for index in bad}
    return Evaluation(source, preprocessing, top_ids, confidences, loss, bad_images)
