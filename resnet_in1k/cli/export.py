"""scripts/export.py: weights to ONNX, a torch.export archive, or clean safetensors, compared before they are kept."""

import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from resnet_in1k.cli.arguments import parse
from resnet_in1k.model.exported import FACTS_NAME, load_exported
from resnet_in1k.model.resnet import ResNet, load_model
from resnet_in1k.model.resolve import Weights, resolve_checkpoint
from resnet_in1k.model.weights import weights_to_save, write_tensors
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.validation import at_least, check_options

COMPARED_BATCH_SIZES = (1, 3)
MAX_BATCH_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and how."""

    ckpt: str
    """As for evaluate.py; also an old .pth, with or without `module.` in its keys."""
    format: Literal["onnx", "pt2", "safetensors"]
    """onnx: for ONNX Runtime; pt2: for torch.export.load; safetensors: with clean keys, as all scripts here read it."""
    output: Path
    """The file to write."""
    image_size: int | None = field(default=None, metadata=at_least(1))
    """Side of the images that an .onnx or .pt2 takes, in pixels; by default as the weights were evaluated."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.output.suffix != f".{self.format}":
            raise UserError(f"--output {self.output}: must end in .{self.format} for --format {self.format}")


def export(options: ExportOptions) -> float:
    """Export, load the result, compare logits, and only then put the file in place.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        UserError: if there are no weights, the output cannot be written, a package is missing, or logits differ.
    """
    weights = resolve_checkpoint(options.ckpt)
    if weights.note:
        print(weights.note, file=sys.stderr)
    model = load_model(weights.file).eval()
    facts = _facts(weights, options.image_size)
    size = facts["image_size"]
    batches = [torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n)) for n in COMPARED_BATCH_SIZES]
    target = FORMATS[options.format]
    difference = 0.0

    def write_and_compare(path: Path) -> None:
        nonlocal difference
        target.write(model, batches[-1], path, facts)
        difference = _relative_difference(model, target.load(model, path), batches)
        if not difference <= target.max_difference:
            raise UserError(
                f"the exported logits differ by {difference:.2g} of the largest, more than "
                f"{target.max_difference:.0e}; {options.output} was not written"
            )

    def write() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(options.output, write_and_compare)

    try:
        problem = files.failure_of(write)
    except ModuleNotFoundError as error:
        raise UserError(f"--format {options.format} needs {error.name}: pip install 'resnet-in1k[export]'") from None
    if problem:
        raise UserError(problem)
    return difference


def _facts(weights: Weights, image_size: int | None) -> dict[str, Any]:
    """What an exported network says of itself: how its images are prepared, what its outputs mean."""
    preprocessing = weights.preprocessing(image_size)
    return {
        "exported_from": files.sha256_of(weights.file),
        "weights": weights.kind,
        "class_names": weights.class_names,
        "image_size": preprocessing.image_size,
        "resize_size": preprocessing.resize_size,
        "interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }


Logits = Callable[[Tensor], np.ndarray]
"""From images, (B, 3, S, S), to (B, C)."""


def _relative_difference(model: ResNet, exported: Logits, batches: list[Tensor]) -> float:
    """The largest difference of logits, relative to the model's largest; infinite if some are not finite."""
    largest = 0.0
    with torch.inference_mode():
        for images in batches:
            expected, actual = model(images).numpy(), exported(images)
            if actual.shape != expected.shape or not np.isfinite(actual).all():
                return float("inf")
            largest = max(largest, float(np.abs(actual - expected).max() / np.abs(expected).max()))
    return largest


def _any_batch_size() -> dict[str, dict[int, object]]:
    return {"x": {0: torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)}}


def _write_onnx(model: ResNet, images: Tensor, path: Path, facts: dict[str, Any]) -> None:
    names = {"input_names": ["images"], "output_names": ["logits"]}
    how = {"dynamo": True, "verbose": False}
    program = torch.onnx.export(model, (images,), dynamic_shapes=_any_batch_size(), **names, **how)
    program.model.metadata_props[FACTS_NAME] = json.dumps(facts)
    program.save(str(path), external_data=False)


def _write_pt2(model: ResNet, images: Tensor, path: Path, facts: dict[str, Any]) -> None:
    archive = path.with_name(path.name + ".pt2")  # the only suffix that torch.export.save takes
    program = torch.export.export(model, (images,), dynamic_shapes=_any_batch_size())
    try:
        torch.export.save(program, archive, extra_files={FACTS_NAME: json.dumps(facts)})
        os.replace(archive, path)
    finally:
        archive.unlink(missing_ok=True)


def _load_exported(suffix: str) -> "Load":
    def load(model: ResNet, path: Path) -> Logits:
        network = load_exported(path, suffix)
        return lambda images: network(images).numpy()

    return load


def _write_safetensors(model: ResNet, images: Tensor, path: Path, facts: dict[str, Any]) -> None:
    write_tensors(weights_to_save(model), path)


def _load_safetensors(model: ResNet, path: Path) -> Logits:
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(load_file(path), strict=True)
    return lambda images: loaded(images).numpy()


Load = Callable[[ResNet, Path], Logits]


class Format(NamedTuple):
    write: Callable[[ResNet, Tensor, Path, dict[str, Any]], None]
    load: Load
    max_difference: float
    """Of logits, relative to the largest of them."""


FORMATS = {
    "onnx": Format(_write_onnx, _load_exported(".onnx"), max_difference=1e-4),  # ONNX Runtime sums in another order
    "pt2": Format(_write_pt2, _load_exported(".pt2"), max_difference=0.0),
    "safetensors": Format(_write_safetensors, _load_safetensors, max_difference=0.0),
}


def main() -> None:
    options = parse(ExportOptions, description="Export weights; the file is kept only if its logits agree.")
    difference = export(options)
    print(f"{options.output} written; its logits differ by {difference:.1g} of the largest")
