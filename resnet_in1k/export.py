"""Weights to other formats: ONNX, torch.export's archive, or clean safetensors; compared before they are kept."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from resnet_in1k import files
from resnet_in1k.checkpoint import save_weights
from resnet_in1k.errors import UserError
from resnet_in1k.model import ResNet, load_model, weights_to_save
from resnet_in1k.weights import find_weights

Format = Literal["onnx", "pt2", "safetensors"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors"}
MAX_RELATIVE_DIFFERENCE: dict[Format, float] = {"onnx": 1e-4, "pt2": 0.0, "safetensors": 0.0}
"""Of logits, over the largest of them. ONNX Runtime sums in another order; the others compute the very same."""
BATCH_SIZES = (1, 3)
MAX_BATCH_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and how."""

    ckpt: str
    """As for evaluate.py; an old .pth, with `module.` in its keys or not, too."""
    format: Format
    """onnx: for ONNX Runtime; pt2: for torch.export.load; safetensors: clean keys, as everything here reads them."""
    output: Path
    """The file to write."""
    image_size: int | None = None
    """Side of the images that an .onnx or .pt2 takes, in pixels; by default as the weights were evaluated."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size {self.image_size}: at least 1")


def export(options: ExportOptions) -> float:
    """Export, load again, compare logits, and only then put the file in place.

    Returns:
        The largest difference of logits, over the largest logit; at most MAX_RELATIVE_DIFFERENCE.

    Raises:
        UserError: if there are no weights, the output cannot be written, a package is missing, or logits differ.
    """
    suffix = SUFFIXES[options.format]
    if options.output.suffix != suffix:
        raise UserError(f"--output {options.output}: a file that ends in {suffix} for --format {options.format}")
    weights = find_weights(options.ckpt)
    if weights.note:
        print(weights.note, file=sys.stderr)
    model = load_model(weights.file).eval()
    image_size = options.image_size or weights.image_size
    images = [
        torch.randn(size, 3, image_size, image_size, generator=torch.Generator().manual_seed(size))
        for size in BATCH_SIZES
    ]
    differences: list[float] = []

    def write_and_compare(path: Path) -> None:
        _WRITERS[options.format](model, images[-1], path)
        differences.append(_difference(model, images, options.format, path))
        if not differences[0] <= MAX_RELATIVE_DIFFERENCE[options.format]:
            raise UserError(
                f"the exported logits differ by {differences[0]:.2g} of the largest, more than "
                f"{MAX_RELATIVE_DIFFERENCE[options.format]:.0e}; {options.output} was not written"
            )

    def write() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(options.output, write_and_compare)

    try:
        problem = files.why_not(write)
    except ModuleNotFoundError as error:
        raise UserError(f"--format {options.format} needs {error.name}: pip install 'resnet-in1k[export]'") from None
    if problem:
        raise UserError(problem)
    return differences[0]


def _write_onnx(model: ResNet, images: torch.Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)
    torch.onnx.export(
        model,
        (images,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"x": {0: batch}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _write_pt2(model: ResNet, images: torch.Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
    archive = path.with_name(path.name + ".pt2")  # the only ending it takes
    try:
        torch.export.save(program, archive)
        os.replace(archive, path)
    finally:
        archive.unlink(missing_ok=True)


def _write_safetensors(model: ResNet, images: torch.Tensor, path: Path) -> None:
    save_weights(weights_to_save(model), path)


_WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "safetensors": _write_safetensors}


def _difference(model: ResNet, batches: list[torch.Tensor], format: Format, path: Path) -> float:
    """The largest difference of logits between the model and what was written, over the model's largest logit."""
    run = _loaded(format, path, model)
    worst = 0.0
    with torch.inference_mode():
        for images in batches:
            expected = model(images).numpy()
            actual = run(images)
            if actual.shape != expected.shape or not np.isfinite(actual).all():
                return float("inf")
            worst = max(worst, float(np.abs(actual - expected).max() / np.abs(expected).max()))
    return worst


def _loaded(format: Format, path: Path, model: ResNet):  # type: ignore[no-untyped-def]
    """What was written, as a function from images to logits."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    if format == "pt2":
        with path.open("rb") as file:
            module = torch.export.load(file).module()
        return lambda images: module(images).numpy()
    other = ResNet(model.architecture, model.fc.out_features)
    from safetensors.torch import load_file

    other.load_state_dict(load_file(path), strict=True)
    return lambda images: other.eval()(images).numpy()
