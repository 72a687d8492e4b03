"""scripts/predict.py: images to class names and probabilities, as a table, JSON lines or a figure."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.cli.preprocessing import PreprocessingOptions
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.image_folder import list_images, open_paths
from resnet_in1k.data.loader import Batch, Loader, prefetch_to_device
from resnet_in1k.data.sampler import EvalOrder
from resnet_in1k.model.resnet import ResNet, load_model
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.utils import files
from resnet_in1k.utils.device import choose_cpu_threads, choose_workers, reproducible_float32, translate_memory_errors
from resnet_in1k.utils.distributed import Launch, make_accelerator, world_size
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import human_names
from resnet_in1k.utils.plots import image_grid, save_figure
from resnet_in1k.utils.pool import translate_worker_errors
from resnet_in1k.utils.validation import at_least, check_options

MAX_IMAGES_IN_FIGURE = 100


@dataclass(frozen=True, kw_only=True)
class PredictOptions(PreprocessingOptions):
    """What to classify, by which weights."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders of them at any depth."""
    ckpt: str
    """As for evaluate.py: a run folder, a checkpoint folder, a weights file, or USER/NAME on the Hub."""
    top_k: int = field(default=5, metadata=at_least(1))
    """How many classes to name for each image."""
    json: bool = False
    """Print one JSON object per image and line."""
    picture: Path | None = None
    """Draw the images with their first predictions to this .png or .svg."""
    batch_size: int = field(default=64, metadata=at_least(1))
    """Images per forward pass; the probabilities do not depend on it, except for rounding."""
    workers: int | None = field(default=None, metadata=at_least(0))
    """Loader workers; by default from the number of CPU cores, and none for a few images."""
    cpu_threads: int | None = field(default=None, metadata=at_least(1))
    """Threads for computing on the CPU; by default all physical cores."""

    def __post_init__(self) -> None:
        check_options(self)
        if not self.images:
            raise UserError("no image given; name files or folders")
        if self.picture is not None and self.picture.suffix not in (".png", ".svg"):
            raise UserError(f"--picture {self.picture}: a file that ends in .png or .svg")


@dataclass(frozen=True)
class Prediction:
    """What was predicted for one file, or why nothing was."""

    file: str
    classes: tuple[tuple[str, str, float], ...] = ()
    """(folder name, name, probability), most probable first."""
    error: str = ""

    def to_json(self) -> str:
        if self.error:
            return json.dumps({"file": self.file, "error": self.error}, ensure_ascii=False)
        classes = [{"class": folder, "name": name, "probability": share} for folder, name, share in self.classes]
        return json.dumps({"file": self.file, "predictions": classes}, ensure_ascii=False)

    def to_table(self) -> str:
        if self.error:
            return f"{self.file}\n  cannot be read: {self.error}"
        lines = [f"  {share:7.2%}  {name}" for _, name, share in self.classes]
        return "\n".join([self.file, *lines])


def predict(options: PredictOptions, report: Callable[[str], None] = print) -> list[Prediction]:
    """Predict all, in the order given, and report each as soon as it is known.

    Raises:
        UserError: if there are no weights; after all others are done, if some images cannot be read.
    """
    if world_size() > 1:
        raise UserError("predict.py is for one process: python scripts/predict.py …")
    weights = resolve_checkpoint(options.ckpt)
    if weights.note:
        print(weights.note, file=sys.stderr)
    model = load_model(weights.file).eval()
    folders = weights.class_names or [f"class {number}" for number in range(model.fc.out_features)]
    if len(folders) != model.fc.out_features:
        raise UserError(f"{weights.file} has {model.fc.out_features} classes, but {len(folders)} names beside it")
    names = human_names(folders)
    preprocessing = options.for_weights(weights)

    predictions = []
    for file, answer in _probabilities(options, model, preprocessing):
        if isinstance(answer, str):
            prediction = Prediction(file, error=answer)
        else:
            order = np.argsort(-answer, kind="stable")[: options.top_k]
            prediction = Prediction(file, tuple((folders[i], names[i], float(answer[i])) for i in order))
        predictions.append(prediction)
        report(prediction.to_json() if options.json else prediction.to_table())

    if options.picture is not None:
        _draw(predictions, options.picture, preprocessing)
    bad = [prediction for prediction in predictions if prediction.error]
    if bad:
        raise UserError(f"{len(bad)} of {len(predictions)} images cannot be read: {bad[0].file} ({bad[0].error})")
    return predictions


def _probabilities(
    options: PredictOptions, model: ResNet, preprocessing: EvalPreprocessing
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Each file with the probabilities of all classes, (C,) float32, or why there are none; in the order given."""
    listed = list(list_images(options.images))
    source = open_paths([file for file, problem in listed if not problem])
    workers = 0 if options.workers is None and len(source) <= options.batch_size else options.workers
    loader = Loader(
        source,
        preprocessing.crop,
        batch_size=options.batch_size,
        largest_image_size=preprocessing.image_size,
        num_workers=choose_workers(workers),
        if_bad="blank_on_any_error",
    )
    with translate_worker_errors(), translate_memory_errors(options.batch_size), loader:
        accelerator = make_accelerator(Launch(), "fp32")
        choose_cpu_threads(accelerator.device, options.cpu_threads)
        known = _answers(
            loader,
            model.to(accelerator.device, memory_format=torch.channels_last),
            accelerator.device,
            EvalOrder(len(source), options.batch_size, preprocessing.image_size),
            preprocessing,
        )
        for file, problem in listed:
            yield file, problem or next(known)


def _answers(
    loader: Loader, model: ResNet, device: torch.device, order: EvalOrder, preprocessing: EvalPreprocessing
) -> Iterator[np.ndarray | str]:
    """In the order of the source: probabilities, (C,) float32, or why the image cannot be read."""
    bad_images: dict[int, str] = {}
    index = 0

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        return (normalize(batch.images, preprocessing.mean, preprocessing.std),)

    for prefetched in prefetch_to_device(loader.batches(order), device, prepare):
        bad_images.update(prefetched.bad_images)
        with torch.inference_mode(), reproducible_float32():
            (images,) = prefetched.tensors()
            rows = model(images).softmax(dim=1).cpu().numpy()  # (B, C)
        for row in rows:
            yield bad_images.get(index, row)
            index += 1


def _draw(predictions: Sequence[Prediction], path: Path, preprocessing: EvalPreprocessing) -> None:
    shown = [prediction for prediction in predictions if not prediction.error][:MAX_IMAGES_IN_FIGURE]
    if not shown:
        return
    encoded = [np.frombuffer(bytearray(Path(prediction.file).read_bytes()), dtype=np.uint8) for prediction in shown]
    images = [preprocessing.square(data) for data in encoded]
    captions = ["\n".join(f"{name} {share:.0%}" for _, name, share in p.classes[:3]) for p in shown]
    if problem := files.failure_of(lambda: save_figure(image_grid(images, captions), path)):
        raise UserError(f"--picture: {problem}")
    more = len([p for p in predictions if not p.error]) - len(shown)
    print(f"figure written to {path}" + (f", without the last {more}" if more else ""), file=sys.stderr)
