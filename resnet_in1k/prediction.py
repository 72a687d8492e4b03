"""Images to class names and probabilities: files and folders in, a table, JSON lines or a picture out."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from resnet_in1k import files
from resnet_in1k.augment import normalise
from resnet_in1k.devices import choose_cpu_threads, choose_workers, inference_memory_explained, make_accelerator
from resnet_in1k.errors import UserError
from resnet_in1k.images import EvalTransform, decode
from resnet_in1k.model import load_model
from resnet_in1k.names import human_names
from resnet_in1k.pipeline import Batch, eval_loader, on_device, worker_deaths_explained
from resnet_in1k.plots import picture_grid, save_figure
from resnet_in1k.recipes import resize_size_for
from resnet_in1k.sources import PackedBytes, Source, images_below
from resnet_in1k.weights import find_weights

MOST_IMAGES_IN_A_PICTURE = 100


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What to look at, by which weights."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders of them at any depth."""
    ckpt: str
    """As for evaluate.py: a run folder, a checkpoint folder, a weights file, or USER/NAME on the Hub."""
    top_k: int = 5
    """How many classes to name for each image."""
    json: bool = False
    """Print one JSON object per image and line."""
    picture: Path | None = None
    """Draw the images with their first predictions to this .png or .svg."""
    image_size: int | None = None
    """Side of the centre crop, in pixels; by default as the weights were evaluated."""
    eval_crop_ratio: float | None = None
    """The short side is resized to image_size / this before the crop; by default as the weights were evaluated."""
    batch_size: int = 64
    """Images per forward; the probabilities do not depend on it, but for rounding."""
    workers: int | None = None
    """Loader workers; by default from the number of CPU cores, and none for a handful of images."""
    cpu_threads: int | None = None
    """Threads for computing on the CPU; by default all physical cores."""

    def __post_init__(self) -> None:
        if not self.images:
            raise UserError("no image given; name files or folders")
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size {self.image_size}: at least 1")
        if self.eval_crop_ratio is not None and not 0 < self.eval_crop_ratio <= 1:
            raise UserError(f"--eval-crop-ratio {self.eval_crop_ratio}: above 0, at most 1")
        if self.picture is not None and self.picture.suffix not in (".png", ".svg"):
            raise UserError(f"--picture {self.picture}: a file that ends in .png or .svg")


@dataclass(frozen=True)
class Prediction:
    """What was seen in one file, or why nothing was."""

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


def predict(options: PredictOptions, say: Callable[[str], None] = print) -> list[Prediction]:
    """Predict all, in the order given, and tell each as soon as it is known.

    Raises:
        UserError: if there are no weights; after all others are done, if some images cannot be read.
    """
    weights = find_weights(options.ckpt)
    if weights.note:
        print(weights.note, file=sys.stderr)
    model = load_model(weights.file).eval()
    accelerator = make_accelerator("fp32")
    if accelerator.num_processes > 1:
        raise UserError("predict.py is for one process: python scripts/predict.py …")
    device = accelerator.device
    choose_cpu_threads(device, options.cpu_threads)
    model = model.to(device, memory_format=torch.channels_last)
    folders = weights.class_names or [f"class {number}" for number in range(model.fc.out_features)]
    if len(folders) != model.fc.out_features:
        raise UserError(f"{weights.file} has {model.fc.out_features} classes, but {len(folders)} names lie beside it")
    names = human_names(folders)
    image_size = options.image_size or weights.image_size
    resize_size = resize_size_for(image_size, options.eval_crop_ratio or weights.eval_crop_ratio)

    predictions = []
    for file, answer in _answers(options, model, device, image_size, resize_size):
        if isinstance(answer, str):
            prediction = Prediction(file, error=answer)
        else:
            order = np.argsort(-answer, kind="stable")[: options.top_k]
            prediction = Prediction(file, tuple((folders[i], names[i], float(answer[i])) for i in order))
        predictions.append(prediction)
        say(prediction.to_json() if options.json else prediction.to_table())

    if options.picture is not None:
        _draw(predictions, options.picture, EvalTransform(image_size=image_size, resize_size=resize_size))
    bad = [prediction for prediction in predictions if prediction.error]
    if bad:
        raise UserError(f"{len(bad)} of {len(predictions)} images cannot be read: {bad[0].file} ({bad[0].error})")
    return predictions


def _answers(
    options: PredictOptions, model: torch.nn.Module, device: torch.device, image_size: int, resize_size: int
) -> Iterator[tuple[str, np.ndarray | str]]:
    """For each file its probabilities, (C,) float32, or why there are none."""
    listed = list(_listed(options.images))
    there = [file for file, problem in listed if not problem]
    # A source without classes: every image is of class 0, and nobody asks.
    source = Source("", "val", ("",), np.zeros(len(there), dtype=np.int64), PackedBytes(map(_encode, there)), Path())
    workers = 0 if options.workers is None and len(there) <= options.batch_size else options.workers
    loader = eval_loader(
        source,
        image_size=image_size,
        resize_size=resize_size,
        batch_size=options.batch_size,
        num_workers=choose_workers(device, workers),
        pin_memory=device.type == "cuda",
        if_bad="blank_even_without_disk",
    )
    bad: dict[int, str] = {}

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        bad.update(batch.bad_images)
        return (normalise(batch.images),)

    def answers() -> Iterator[np.ndarray | str]:
        place = 0
        for take in on_device(loader, device, prepare):
            with torch.inference_mode():
                (images,) = take()
                rows = model(images).softmax(dim=1).cpu().numpy()  # (B, C)
            for row in rows:
                yield bad.get(place, row)
                place += 1

    with worker_deaths_explained(), inference_memory_explained(options.batch_size):
        known = answers()
        for file, problem in listed:
            yield file, problem or next(known)


def _encode(file: str) -> bytes:
    return Path(file).as_posix().encode("utf-8", "surrogateescape")


def _listed(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Each image file with "", or a path with what is wrong with it."""
    for path in paths:
        try:
            if path.is_dir():
                below = sorted(images_below(path, str(path), ignored=[]))
                yield from ((file, "") for file in below)
                if not below:
                    yield str(path), "no images in this folder"
            else:
                path.open("rb").close()
                yield str(path), ""
        except OSError as error:
            yield str(path), error.strerror or str(error)


def _draw(predictions: Sequence[Prediction], path: Path, transform: EvalTransform) -> None:
    shown = [prediction for prediction in predictions if not prediction.error][:MOST_IMAGES_IN_A_PICTURE]
    if not shown:
        return
    encoded = [np.frombuffer(bytearray(Path(prediction.file).read_bytes()), dtype=np.uint8) for prediction in shown]
    images = [transform(decode(data), 0, 0).permute(1, 2, 0).numpy() for data in encoded]
    captions = ["\n".join(f"{name} {share:.0%}" for _, name, share in p.classes[:3]) for p in shown]
    if problem := files.why_not(lambda: save_figure(picture_grid(images, captions), path)):
        raise UserError(f"--picture: {problem}")
    more = len([p for p in predictions if not p.error]) - len(shown)
    print(f"picture written to {path}" + (f", without the last {more}" if more else ""), file=sys.stderr)
