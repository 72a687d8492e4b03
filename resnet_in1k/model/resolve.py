"""`--ckpt` to a weights file and what is known of it: in a run folder, in a file of its own, or on the Hub."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.registry import SOURCES
from resnet_in1k.model.exported import is_exported, read_facts
from resnet_in1k.model.foreign import (
    DEFAULT_CROP_RATIO,
    DEFAULT_IMAGE_SIZE,
    MAX_IMAGE_SIZE,
    MIN_CROP_RATIO,
    RGB,
    PublishedConfig,
    as_rgb,
    check_size,
    read_published_config,
)
from resnet_in1k.model.hub_files import REPOSITORY, download
from resnet_in1k.model.torchvision_weights import PREFIX, download_torchvision_weights, torchvision_weights
from resnet_in1k.model.weights import WEIGHTS_NAME, weights_file
from resnet_in1k.recipes.recipe import Interpolation, PublishedWeights, Recipe, crop_ratio_for, resize_size_for
from resnet_in1k.run_folder import EVALUATION_NAME, find_run, read_recipe
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import printable

DEFAULT_PREPROCESSING = EvalPreprocessing(DEFAULT_IMAGE_SIZE, resize_size_for(DEFAULT_IMAGE_SIZE, DEFAULT_CROP_RATIO))
"""Of weights of which nothing says theirs."""


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
    """The eval.json beside it, if it is of these weights, or of those that this network was exported from."""
    note: str
    """A warning for the user; "" for none."""
    mean: RGB = imagenet.MEAN
    std: RGB = imagenet.STD
    val_share: float = 0.0
    """Of data without a val split, as the run divided them."""
    origin: str = ""
    """USER/NAME on the Hub or torchvision/MODEL.WEIGHTS; "" for a file of this machine."""
    exported_from: str = ""
    """Of an exported network: the sha256 of the weights that it was made from, if it says so."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no image can be prepared by: the files may come from anywhere."""
        ratio, names = self.eval_crop_ratio, self.class_names
        check_size(self.image_size, "image size", MAX_IMAGE_SIZE, self.file)
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

    def preprocessing(
        self,
        image_size: int | None = None,
        eval_crop_ratio: float | None = None,
        interpolation: Interpolation | None = None,
        mean: RGB | None = None,
        std: RGB | None = None,
    ) -> EvalPreprocessing:
        """As the weights were evaluated, except for what is given."""
        size = image_size or self.image_size
        return EvalPreprocessing(
            size,
            resize_size_for(size, eval_crop_ratio or self.eval_crop_ratio),
            interpolation or self.interpolation,
            mean or self.mean,
            std or self.std,
        )


def resolve_checkpoint(checkpoint: str | Path, **client_options: Any) -> Weights:
    """`--ckpt`: a run folder, a checkpoint folder, a file, a repository on the Hub, which is downloaded, or
    `torchvision/MODEL.WEIGHTS`.

    The preprocessing is that which an exported network names, else that of the evaluation recorded beside the weights,
    if it is theirs, else that of a published config.json, else that of the run's recipe, else 224 px of 256, bilinear.

    Args:
        client_options: `revision`, `token`, `cache_dir` … of huggingface_hub's snapshot_download.

    Raises:
        UserError: if there are no weights, or what lies beside them cannot be read.
    """
    path, is_downloaded = Path(checkpoint), False
    if not path.exists() and str(checkpoint).startswith(PREFIX):
        return _of_torchvision(str(checkpoint))
    if not path.exists() and _is_repository(str(checkpoint)):
        path, is_downloaded = download(str(checkpoint), **client_options), True
    file = weights_file(path)
    exported = read_facts(file) if is_exported(file) else {}
    measured = exported.get("exported_from") if is_exported(file) else files.sha256_of(file)
    recorded, note = _evaluation_beside(file, measured)
    config = read_published_config(file.parent)
    run = find_run(path)
    recipe, facts = read_recipe(run) if run is not None else (None, {})
    says = exported or recorded or {}
    try:
        names = says.get("class_names") or facts.get("data", {}).get("class_names")
        source = facts["data"]["source"] if facts else None
        val_share = facts["data"].get("val_share", 0.0) if facts else 0.0
        if is_downloaded and source not in SOURCES:  # a stranger's path says nothing here, and is not theirs to choose
            source = None
        preprocessing = config or _of_recipe(recipe)
        if says:
            preprocessing = _recorded_preprocessing(says, preprocessing, file)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"the files beside {file} are incomplete ({type(error).__name__}: {error})") from None
    of_file = "ema" if file.stem == "ema" else "model"
    if recipe is not None and run is not None and file == run.weights:
        of_file = recipe.publish
    kind = says.get("weights", of_file)
    return Weights(
        file=file,
        kind="ema" if kind == "ema" else "model",
        class_names=names or (config.class_names if config else None),
        data=source,
        image_size=preprocessing.image_size,
        eval_crop_ratio=preprocessing.eval_crop_ratio,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        recorded_evaluation=recorded,
        note=note,
        val_share=val_share if isinstance(val_share, float) else 0.0,
        origin=str(checkpoint) if is_downloaded else "",
        exported_from=str(exported.get("exported_from", "")),
    )


def _evaluation_beside(file: Path, sha256: Any) -> tuple[dict[str, Any] | None, str]:
    """The eval.json, if it is of weights with that sum; and a warning if it is of others."""
    recorded = files.read_json_object(file.parent / EVALUATION_NAME)
    if recorded is None or recorded.get("weights_sha256") == sha256:
        return recorded, ""
    if file.name != WEIGHTS_NAME or "weights_sha256" not in recorded:
        return None, ""
    return None, f"{file} is not what the {EVALUATION_NAME} beside it was measured on: replaced since, or damaged"


def _recorded_preprocessing(recorded: dict[str, Any], otherwise: PublishedConfig, file: Path) -> PublishedConfig:
    image_size, resize_size = recorded["image_size"], recorded["resize_size"]
    # Checked before it computes: it would count for years to a size between two whole numbers.
    check_size(image_size, "image size", MAX_IMAGE_SIZE, file)
    check_size(resize_size, "resize size", math.ceil(MAX_IMAGE_SIZE / MIN_CROP_RATIO), file)
    return PublishedConfig(
        image_size=image_size,
        eval_crop_ratio=crop_ratio_for(image_size, resize_size, otherwise.eval_crop_ratio),
        interpolation=recorded.get("interpolation", "bilinear"),
        mean=as_rgb(recorded.get("mean", imagenet.MEAN)),
        std=as_rgb(recorded.get("std", imagenet.STD), above=0),
    )


def _of_recipe(recipe: Recipe | None) -> PublishedConfig:
    if recipe is None:
        return PublishedConfig(DEFAULT_IMAGE_SIZE, DEFAULT_CROP_RATIO, "bilinear")
    return PublishedConfig(recipe.eval_size, recipe.eval_crop_ratio, recipe.eval_interpolation)


def _of_torchvision(name: str) -> Weights:
    weights = torchvision_weights(name)
    transforms = weights.transforms()
    (image_size,), (resize_size,) = transforms.crop_size, transforms.resize_size
    return Weights(
        file=download_torchvision_weights(name, weights),
        class_names=list(imagenet.names_by_wnid()),
        data=None,
        image_size=image_size,
        eval_crop_ratio=crop_ratio_for(image_size, resize_size, DEFAULT_CROP_RATIO),
        interpolation=transforms.interpolation.value,
        mean=as_rgb(transforms.mean),
        std=as_rgb(transforms.std),
        kind="model",
        recorded_evaluation=None,
        note="",
        origin=name,
    )


def _is_repository(checkpoint: str) -> bool:
    """Whether it can mean one: USER/NAME, and no path of which a part is here."""
    return bool(REPOSITORY.fullmatch(checkpoint)) and not (
        Path(checkpoint).parent.exists() or Path(checkpoint).suffix in (".pth", ".pt", ".safetensors", ".onnx", ".pt2")
    )
