"""Classify images: class names and probabilities as a table, JSON lines or a figure."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.cli.arguments import parse
from resnet_in1k.cli.options import PredictOptions
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.image_folder import FileSource, open_paths
from resnet_in1k.data.loader import prefetch_to_device
from resnet_in1k.data.sampler import eval_specs
from resnet_in1k.evaluate.evaluation import EvalLoader
from resnet_in1k.model.resnet import ResNet, load_model
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.utils import files
from resnet_in1k.utils.device import choose_cpu_threads, choose_workers, device_type, reproducible_float32
from resnet_in1k.utils.errors import UserError, translate_errors
from resnet_in1k.utils.format import count, printable
from resnet_in1k.utils.imagenet import human_names
from resnet_in1k.utils.plots import figure_labels, image_grid, save_figure
from resnet_in1k.utils.process import program, world_size

Prediction = dict[str, Any]
"""`file`, and either `predictions`, the most probable classes, or `error`."""


def main() -> None:
    predict(parse(PredictOptions))


def predict(options: PredictOptions, report: Callable[[str], None] = print) -> list[Prediction]:
    """Classify all images in the given order and report each; at the end raise UserError if some cannot be read."""
    if world_size() > 1:
        raise UserError(f"prediction runs in one process: {program('predict')} …")
    weights = resolve_checkpoint(options.ckpt, options.weights)
    model = load_model(weights.file, weights.wanted).eval()
    preprocessing = options.change(weights.preprocessing)
    folders = weights.class_names or [f"class {number}" for number in range(model.num_outputs)]
    if len(folders) != model.num_outputs:
        raise UserError(f"{weights.file} has {model.num_outputs} classes, but {len(folders)} recorded class names")
    names, source = human_names(folders), open_paths(options.images)
    predictions = []
    for index, answer in enumerate(_answers(options, model, preprocessing, source)):
        file = source.image_name(index)
        if isinstance(answer, str):
            prediction, lines = {"file": file, "error": answer}, [f"  cannot be read: {answer}"]
        else:
            order = np.argsort(-answer, kind="stable")[: options.top_k]
            best = [{"class": folders[i], "name": names[i], "probability": float(answer[i])} for i in order]
            lines = [f"  {each['probability']:7.2%}  {each['name']}" for each in best]
            prediction = {"file": file, "predictions": best}
        predictions.append(prediction)
        text = "\n".join([printable(file), *lines])
        report(json.dumps(prediction, ensure_ascii=False) if options.json else text)
    good, bad = ([each for each in predictions if key in each] for key in ("predictions", "error"))
    if options.picture is not None and good:
        _draw(good[:100], options.picture, preprocessing, folders)
    if bad:
        raise UserError(f"{len(bad)} of {len(predictions)} images cannot be read: {bad[0]['file']} ({bad[0]['error']})")
    return predictions


def _answers(
    options: PredictOptions, model: ResNet, preprocessing: EvalPreprocessing, source: FileSource
) -> Iterator[np.ndarray | str]:
    """Yield the probabilities of each image, (C,) float32, or the reason why it cannot be read."""
    few = options.workers is None and len(source) <= options.batch_size
    workers = 0 if few else choose_workers(options.workers)
    specs = eval_specs(len(source), options.batch_size, preprocessing.image_size)
    with (
        translate_errors(options.batch_size, "use a smaller --batch-size"),
        EvalLoader(source, preprocessing, options.batch_size, workers, if_bad="blank_on_any_error") as loader,
    ):
        device = torch.device(device_type())
        choose_cpu_threads(device, options.cpu_threads)
        model.to(device, memory_format=torch.channels_last)
        batches = prefetch_to_device(
            loader.batches(specs),
            device,
            lambda batch: (normalize(batch.images, preprocessing.mean, preprocessing.std), batch.indices),
        )
        for bad_images, take in batches:
            with torch.inference_mode(), reproducible_float32():
                images, indices = take()
                rows = model(images).softmax(dim=1).cpu().numpy()  # (B, C)
            yield from map(bad_images.get, indices.tolist(), rows)


def _draw(shown: Sequence[Prediction], path: Path, preprocessing: EvalPreprocessing, classes: Sequence[str]) -> None:
    images = [preprocessing.square(np.fromfile(each["file"], dtype=np.uint8)) for each in shown]
    numbers = [f"class {number}" for number in range(len(classes))]
    with files.user_errors("--picture: "), figure_labels(human_names(classes), numbers) as names:
        name_of = dict(zip(classes, names, strict=True))
        best = [[f"{name_of[f['class']]} {f['probability']:.0%}" for f in each["predictions"][:3]] for each in shown]
        save_figure(image_grid(images, ["\n".join(lines) for lines in best]), path)
    print(f"figure of {count(len(shown), 'image')} written to {path}", file=sys.stderr)
