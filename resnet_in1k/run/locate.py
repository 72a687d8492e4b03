"""`--ckpt` to a weights file and what is known of it: in a run folder, in a file of its own, or on the Hub."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_in1k.core import files, imagenet
from resnet_in1k.core.errors import UserError
from resnet_in1k.core.text import printable
from resnet_in1k.data.crops import EvalPreprocessing
from resnet_in1k.data.sources import SOURCES
from resnet_in1k.model.hub_files import download
from resnet_in1k.model.weights_file import WEIGHTS_NAME, weights_file
from resnet_in1k.recipes.recipe import Interpolation, PublishedWeights, crop_ratio_for, resize_size_for
from resnet_in1k.run.folder import EVALUATION_NAME, find_run
from resnet_in1k.run.recipe_file import read_recipe

CONFIG_NAME = "config.json"
DEFAULT_IMAGE_SIZE, DEFAULT_CROP_RATIO = 224, 0.875
MAX_IMAGE_SIZE, MIN_CROP_RATIO = 4096, 0.1
"""An image of that size takes a gigabyte in a ResNet-50; a batch of them would take any machine's memory."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Weights:
    """A weights file, and what the files beside it say of it; None where they say nothing."""

    file: Path
    class_names: list[str] | None
    """As the folders of its training data were named; of other projects' repositories, as those name them."""
    data: str | None
    """What it was trained on, as `--data` named it."""
    image_size: int
    eval_crop_ratio: float
    interpolation: Interpolation
    kind: PublishedWeights
    """Of a run: the model's own weights or their moving average."""
    recorded_evaluation: dict[str, Any] | None
    """The eval.json beside it, if it is of these weights."""
    note: str
    """A warning for the user; "" for none."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no image can be prepared by: the files may come from anywhere."""
        ratio, names = self.eval_crop_ratio, self.class_names
        _check_size(self.image_size, "image size", MAX_IMAGE_SIZE, self.file)
        if type(ratio) not in (int, float) or not MIN_CROP_RATIO <= ratio <= 1:
            raise UserError(
                f"beside {self.file}: crop ratio {ratio!r:.40}; must be a number from {MIN_CROP_RATIO} to 1"
            )
        if not isinstance(self.data, str | None):
            raise UserError(f"beside {self.file}: the data are named by {self.data!r:.40}, which is no text")
        if names is not None:
            if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise UserError(f"beside {self.file}: the class names are no list of texts")
            object.__setattr__(self, "class_names", [printable(name) for name in names])

    def preprocessing(self, image_size: int | None = None, eval_crop_ratio: float | None = None) -> EvalPreprocessing:
        """As the weights were evaluated, except for what is given."""
        size = image_size or self.image_size
        return EvalPreprocessing(
            size, resize_size_for(size, eval_crop_ratio or self.eval_crop_ratio), self.interpolation
        )


def find_weights(checkpoint: str | Path) -> Weights:
    """`--ckpt`: a run folder, a checkpoint folder, a file, or a repository on the Hub, which is downloaded.

    The preprocessing is that of the evaluation recorded beside the weights, if it is theirs, else that of a published
    config.json, else that of the run's recipe, else 224 px of 256, bilinear.

    Raises:
        UserError: if there are no weights, or what lies beside them cannot be read.
    """
    path, is_downloaded = Path(checkpoint), False
    if not path.exists() and _is_repository(str(checkpoint)):
        path, is_downloaded = download(str(checkpoint)), True
    file = weights_file(path)
    recorded = _read_json(file.parent / EVALUATION_NAME)
    note = ""
    if recorded is not None and recorded.get("weights_sha256") != files.sha256_of(file):
        if file.name == WEIGHTS_NAME and "weights_sha256" in recorded:
            note = f"{file} is not what the {EVALUATION_NAME} beside it was measured on: replaced since, or damaged"
        recorded = None
    config = _read_json(file.parent / CONFIG_NAME) or {}
    settings = config.get("pretrained_cfg") or {}
    run = find_run(path)
    recipe, facts = read_recipe(run) if run is not None else (None, {})
    try:
        if settings and tuple(settings["mean"]) != imagenet.MEAN:
            raise UserError(f"{file}: made for images normalised differently than here; use timm for it")
        names = (recorded or {}).get("class_names") or facts.get("data", {}).get("class_names")
        crop_ratio = recipe.eval_crop_ratio if recipe is not None else DEFAULT_CROP_RATIO
        crop_ratio = settings.get("crop_pct", crop_ratio)
        if recorded is not None:
            image_size, interpolation = recorded["image_size"], recorded.get("interpolation", "bilinear")
            # Checked before it computes: it would count for years to a size between two whole numbers.
            _check_size(image_size, "image size", MAX_IMAGE_SIZE, file)
            _check_size(recorded["resize_size"], "resize size", math.ceil(MAX_IMAGE_SIZE / MIN_CROP_RATIO), file)
            crop_ratio = crop_ratio_for(image_size, recorded["resize_size"], crop_ratio)
        elif settings:
            image_size, interpolation = settings["input_size"][1], settings["interpolation"]
        elif recipe is not None:
            image_size, interpolation = recipe.eval_size, recipe.eval_interpolation
        else:
            image_size, interpolation = DEFAULT_IMAGE_SIZE, "bilinear"
        if interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"{file}: made for images resized by {interpolation} interpolation; use timm for it")
        source = facts["data"]["source"] if facts else None
        if is_downloaded and source not in SOURCES:  # a stranger's path says nothing here, and is not theirs to choose
            source = None
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise UserError(f"the files beside {file} are incomplete ({type(error).__name__}: {error})") from None
    of_file = "ema" if file.stem == "ema" else "model"
    if recipe is not None and run is not None and file == run.weights:
        of_file = recipe.publish
    kind = (recorded or {}).get("weights", of_file)
    return Weights(
        file=file,
        kind="ema" if kind == "ema" else "model",
        class_names=names or config.get("label_names"),
        data=source,
        image_size=image_size,
        eval_crop_ratio=crop_ratio,
        interpolation=interpolation,
        recorded_evaluation=recorded,
        note=note,
    )


def _check_size(size: object, what: str, at_most: int, file: Path) -> None:
    if type(size) is not int or not 1 <= size <= at_most:  # True is an int by inheritance
        raise UserError(f"beside {file}: {what} {size!r:.40}; must be a whole number from 1 to {at_most}")


def _is_repository(checkpoint: str) -> bool:
    """Whether it can mean one: USER/NAME, and no path of which a part is here."""
    return bool(_REPOSITORY.fullmatch(checkpoint)) and not (
        Path(checkpoint).parent.exists() or Path(checkpoint).suffix in (".pth", ".pt", ".safetensors")
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    """None if there is none, or it is not a whole JSON object."""
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError, TypeError):
        return None
