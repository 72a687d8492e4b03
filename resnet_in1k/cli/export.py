"""scripts/export.py: write weights as ONNX, torch.export archive or safetensors, and compare the logits."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

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
MAX_DIFFERENCE = {"onnx": 1e-4, "pt2": 0.0, "safetensors": 0.0}
"""Largest difference of the logits, relative to the largest logit; ONNX Runtime adds in another order."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export weights; the file is kept only if its logits agree."""

    ckpt: str
    """Weights, as for evaluate.py; also an old .pth, with or without `module.` in its keys."""
    format: Literal["onnx", "pt2", "safetensors"]
    """onnx: for ONNX Runtime; pt2: for torch.export.load; safetensors: with torchvision's keys."""
    output: Path
    """The file to write."""
    image_size: int | None = field(default=None, metadata=at_least(1))
    """Side of the images for .onnx and .pt2, in pixels; by default that of the weights' evaluation."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.output.suffix != f".{self.format}":
            raise UserError(f"--output {self.output}: must end in .{self.format} for --format {self.format}")


def export(options: ExportOptions) -> float:
    """Export to a temporary file, load it, compare its logits with the model's, then rename it to `--output`.

    Returns:
        The largest difference of the logits, relative to the largest logit; UserError if it is more than rounding.
    """
    weights = resolve_checkpoint(options.ckpt)
    if weights.note:
        print(weights.note, file=sys.stderr)
    model = load_model(weights.file).eval()
    facts = _facts(weights, options.image_size)
    size, limit = facts["image_size"], MAX_DIFFERENCE[options.format]
    batches = [torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n)) for n in COMPARED_BATCH_SIZES]
    differences = []

    def write_and_compare(path: Path) -> None:
        _write(options.format, model, batches[-1], path, facts)
        differences.append(_relative_difference(model, _load(options.format, model, path), batches))
        if not differences[-1] <= limit:
            raise UserError(
                f"the exported logits differ by {differences[-1]:.2g} of the largest, more than {limit:.0e}; "
                f"{options.output} was not written"
            )

    with files.user_errors():
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(options.output, write_and_compare)
        except ModuleNotFoundError as error:
            advice = "pip install 'resnet-in1k[export]'"
            raise UserError(f"--format {options.format} needs {error.name}: {advice}") from None
    return differences[-1]


def _facts(weights: Weights, image_size: int | None) -> dict[str, Any]:
    """Return the metadata of an exported network: origin, class names and preprocessing."""
    preprocessing = weights.preprocessing(image_size)
    return {
        "exported_from": files.sha256_of(weights.file),
        "weights": weights.kind,
        "class_names": weights.class_names,
        **asdict(preprocessing),
    }


def _write(format: str, model: ResNet, images: Tensor, path: Path, facts: dict[str, Any]) -> None:
    if format == "safetensors":
        write_tensors(weights_to_save(model), path)
        return
    any_batch_size = {"x": {0: torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)}}
    if format == "onnx":
        options = {"dynamo": True, "verbose": False, "input_names": ["images"], "output_names": ["logits"]}
        program = torch.onnx.export(model, (images,), dynamic_shapes=any_batch_size, **options)
        program.model.metadata_props[FACTS_NAME] = json.dumps(facts)
        program.save(str(path), external_data=False)
        return
    archive = path.with_name(path.name + ".pt2")  # the only suffix that torch.export.save accepts
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=any_batch_size)
        torch.export.save(program, archive, extra_files={FACTS_NAME: json.dumps(facts)})
        os.replace(archive, path)
    finally:
        archive.unlink(missing_ok=True)


def _load(format: str, model: ResNet, path: Path) -> Callable[[Tensor], Tensor]:
    if format != "safetensors":
        return load_exported(path, f".{format}")
    loaded = ResNet(model.architecture, num_classes=model.fc.out_features)
    loaded.load_state_dict(load_file(path), strict=True)
    return loaded.eval()


def _relative_difference(model: ResNet, exported: Callable[[Tensor], Tensor], batches: list[Tensor]) -> float:
    """Return the largest difference of logits, relative to the model's largest; infinite if some are not finite."""
    largest = 0.0
    with torch.inference_mode():
        for images in batches:
            expected, actual = model(images).numpy(), exported(images).numpy()
            if actual.shape != expected.shape or not np.isfinite(actual).all():
                return float("inf")
            largest = max(largest, float(np.abs(actual - expected).max() / np.abs(expected).max()))
    return largest


def main() -> None:
    options = parse(ExportOptions)
    difference = export(options)
    print(f"{options.output} written; its logits differ by {difference:.1g} of the largest")
