"""Export weights to ONNX, torch.export or safetensors, and compare the logits."""

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from resnet_in1k.cli.arguments import parse
from resnet_in1k.cli.options import ExportOptions
from resnet_in1k.model.exported import FACTS_NAME, load_exported
from resnet_in1k.model.resnet import ResNet, load_model
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.model.weights import sha256_of_weights, weights_to_save, write_tensors
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError

MAX_DIFFERENCE = {"onnx": 1e-4, "pt2": 0.0, "safetensors": 0.0}
"""Largest difference of the logits, relative to the largest logit; ONNX Runtime adds in another order."""


def export(options: ExportOptions) -> float:
    """Export to a temporary file, load it, compare its logits with the model's, then rename it to `--output`.

    Returns the largest difference of the logits, relative to the largest logit; UserError if it is more than rounding.
    """
    weights = resolve_checkpoint(options.ckpt, options.weights)
    model = load_model(weights.file, weights.wanted).eval()
    preprocessing = weights.preprocessing.at(options.image_size or weights.preprocessing.image_size)
    facts = {"exported_from": sha256_of_weights(weights.file), "weights": weights.kind}
    facts |= {"class_names": weights.class_names, **vars(preprocessing)}
    size, limit, folder = preprocessing.image_size, MAX_DIFFERENCE[options.format], options.output.parent
    batches = [torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n)) for n in (1, 3)]
    with files.user_errors():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as temporary:
            path = Path(temporary, options.output.name)  # the suffix stays: it tells torch and us the format
            _write(options.format, model, batches[-1], path, json.dumps(facts))
            written = load_model(path).eval() if options.format == "safetensors" else load_exported(path)
            with torch.inference_mode():
                expected, actual = (torch.cat([network(images) for images in batches]) for network in (model, written))
            difference = float((actual - expected).abs().max() / expected.abs().max())
            if not difference <= limit:  # it may be NaN
                raise UserError(
                    f"the exported logits differ by {difference:.2g} of the largest, more than {limit:.0e}; "
                    f"{options.output} was not written"
                )
            files.write_atomically(options.output, path.replace)
    return difference


def _write(format: str, model: ResNet, images: Tensor, path: Path, facts: str) -> None:
    any_batch_size = {"x": {0: torch.export.Dim("batch", min=1, max=1024)}}
    if format == "safetensors":
        write_tensors(weights_to_save(model), path)
    elif format == "pt2":
        program = torch.export.export(model, (images,), dynamic_shapes=any_batch_size)
        torch.export.save(program, path, extra_files={FACTS_NAME: facts})
    else:
        options = {"dynamo": True, "verbose": False, "input_names": ["images"], "output_names": ["logits"]}
        try:
            program = torch.onnx.export(model, (images,), dynamic_shapes=any_batch_size, **options)
        except ModuleNotFoundError as error:
            raise UserError(f"--format onnx needs {error.name}: pip install onnx onnxscript onnxruntime") from None
        program.model.metadata_props[FACTS_NAME] = facts
        program.save(str(path), external_data=False)


def main() -> None:
    options = parse(ExportOptions)
    difference = export(options)
    print(f"{options.output} written; its logits differ by {difference:.1g} of the largest")
