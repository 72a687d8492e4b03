"""Resolve `--ckpt` to a weights file and its metadata: in a run folder, in a file, on the Hub or from torchvision."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.registry import SOURCES
from resnet_in1k.model import foreign
from resnet_in1k.model.exported import is_exported, read_facts
from resnet_in1k.model.foreign import ForeignConfig, as_rgb, check_size
from resnet_in1k.model.weights import PICKLE_NAME, WEIGHTS_NAME, weights_file
from resnet_in1k.recipes.recipe import PublishedWeights, Recipe, crop_ratio_for, resize_size_for
from resnet_in1k.run_folder import EVALUATION_NAME, RECIPE_NAME, find_run, read_recipe
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import file_size, first_line, printable

DEFAULT_PREPROCESSING = EvalPreprocessing(image_size=224, resize_size=256)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""USER/NAME on the Hub."""
JSON_NAMES = (foreign.CONFIG_NAME, foreign.PREPROCESSOR_NAME, EVALUATION_NAME, RECIPE_NAME)
MAX_BYTES = {WEIGHTS_NAME: 10**9, PICKLE_NAME: 10**9, **dict.fromkeys(JSON_NAMES, 10**7)}
"""Largest size of each file that is downloaded; the weights of a ResNet-152 have 0.24 GB."""


@dataclass(frozen=True, kw_only=True)
class Weights(ForeignConfig):
    """A weights file with its preprocessing, class names and other metadata.

    Raises:
        UserError: for sizes, ratios or names that cannot be used, since the files may come from anywhere.
    """

    file: Path
    data: str | None = None
    """Training data, as `--data` named them; None if not recorded."""
    kind: PublishedWeights = "model"
    """The model's own weights, or their moving average."""
    recorded_evaluation: dict[str, Any] | None = None
    """eval.json in the same folder, if it is of these weights or, for an exported network, of the original ones."""
    note: str = ""
    """A warning for the user; "" for none."""
    val_share: float = 0.0
    """Share of the images that the run held out for validation; 0 if the data have a val split."""
    origin: str = ""
    """USER/NAME on the Hub or torchvision/MODEL.WEIGHTS; "" for a file of this machine."""
    exported_from: str = ""
    """sha256 of the weights that an exported network was made from; "" if it is not recorded."""

    def __post_init__(self) -> None:
        ratio, names = self.eval_crop_ratio, self.class_names
        check_size(self.image_size, "image size", foreign.MAX_IMAGE_SIZE, self.file)
        if type(ratio) not in (int, float) or not foreign.MIN_CROP_RATIO <= ratio <= 1:
            raise UserError(f"{self.file}: crop ratio {ratio!r:.40} is not a number from {foreign.MIN_CROP_RATIO} to 1")
        if not isinstance(self.data, str | None):
            raise UserError(f"{self.file}: the name of its data, {self.data!r:.40}, is not a text")
        if names is not None:
            if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise UserError(f"{self.file}: its class names are not a list of texts")
            object.__setattr__(self, "class_names", [printable(name) for name in names])

    def preprocessing(self, image_size: int | None = None) -> EvalPreprocessing:
        """Return the recorded preprocessing, for another image size if one is given."""
        size = image_size or self.image_size
        resize_size = resize_size_for(size, self.eval_crop_ratio)
        return EvalPreprocessing(size, resize_size, self.interpolation, self.mean, self.std)


def resolve_checkpoint(checkpoint: str | Path, **client_options: Any) -> Weights:
    """Find the weights that `--ckpt` names, and the files in their folder that describe them.

    Args:
        checkpoint: a run folder, checkpoint folder or file; USER/NAME on the Hub; or torchvision/MODEL.WEIGHTS.
        client_options: `revision`, `token`, `cache_dir` … of huggingface_hub's snapshot_download.

    Raises:
        UserError: if there are no weights, they cannot be downloaded, or the files with them cannot be read.
    """
    path, name = Path(checkpoint), str(checkpoint)
    if not path.exists() and name.startswith(foreign.TORCHVISION):
        return _resolve_torchvision(name)
    is_downloaded = not path.exists() and _is_repository(name)
    if is_downloaded:
        path = download(name, **client_options)
    file = weights_file(path)
    exported = read_facts(file) if is_exported(file) else {}
    sha256 = exported.get("exported_from") if is_exported(file) else files.sha256_of(file)
    evaluation, note = _evaluation_of(file, sha256)
    config, run = foreign.read_foreign_config(file.parent), find_run(path)
    recipe, facts = read_recipe(run) if run is not None else (None, {})
    measured, kind = exported or evaluation or {}, "ema" if file.stem == "ema" else "model"
    if recipe is not None and run is not None and file == run.weights:
        kind = recipe.publish
    try:
        data = facts["data"] if facts else {}
        source, val_share = data["source"] if facts else None, data.get("val_share", 0.0)
        names = measured.get("class_names") or data.get("class_names") or (config.class_names if config else None)
        preprocessing = _recorded_preprocessing(measured, config, recipe, file)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"the files with {file} are incomplete ({type(error).__name__}: {error})") from None
    return Weights(
        file=file,
        **vars(replace(preprocessing, class_names=names)),
        kind="ema" if measured.get("weights", kind) == "ema" else "model",
        # A path in a downloaded recipe.json could name any folder of this machine.
        data=None if is_downloaded and source not in SOURCES else source,
        recorded_evaluation=evaluation,
        note=note,
        val_share=val_share if isinstance(val_share, float) else 0.0,
        origin=name if is_downloaded else "",
        exported_from=str(exported.get("exported_from", "")),
    )


def _evaluation_of(file: Path, sha256: Any) -> tuple[dict[str, Any] | None, str]:
    """Return the eval.json in the file's folder if its weights have that sha256, and a warning if they differ."""
    evaluation = files.read_json_object(file.parent / EVALUATION_NAME)
    if evaluation is None or evaluation.get("weights_sha256") == sha256:
        return evaluation, ""
    if file.name != WEIGHTS_NAME or "weights_sha256" not in evaluation:
        return None, ""
    return None, f"{file} is not the file that {EVALUATION_NAME} was measured on: it was replaced or is damaged"


def _recorded_preprocessing(
    measured: dict[str, Any], config: ForeignConfig | None, recipe: Recipe | None, file: Path
) -> ForeignConfig:
    """Return the first preprocessing that is recorded, in this order:

    1. `measured`: the facts in an exported network, or else the eval.json of these weights;
    2. config.json, as timm, transformers and this project publish it;
    3. the run's recipe;
    4. 224 px, cropped from 256 px, bilinear.
    """
    otherwise = config or ForeignConfig()
    if config is None and recipe is not None:
        otherwise = ForeignConfig(recipe.eval_size, recipe.eval_crop_ratio, recipe.eval_interpolation)
    if not measured:
        return otherwise
    image_size, resize_size = measured["image_size"], measured["resize_size"]
    # Checked first, since crop_ratio_for does not end for a resize size that is not an integer.
    check_size(image_size, "image size", foreign.MAX_IMAGE_SIZE, file)
    check_size(resize_size, "resize size", math.ceil(foreign.MAX_IMAGE_SIZE / foreign.MIN_CROP_RATIO), file)
    return ForeignConfig(
        image_size=image_size,
        eval_crop_ratio=crop_ratio_for(image_size, resize_size, otherwise.eval_crop_ratio),
        interpolation=measured.get("interpolation", "bilinear"),
        mean=as_rgb(measured.get("mean", imagenet.MEAN)),
        std=as_rgb(measured.get("std", imagenet.STD), above=0),
    )


def _resolve_torchvision(name: str) -> Weights:
    weights = foreign.torchvision_weights(name)
    transforms = weights.transforms()
    (image_size,), (resize_size,) = transforms.crop_size, transforms.resize_size
    return Weights(
        file=foreign.download_torchvision_weights(name, weights),
        class_names=list(imagenet.names_by_wnid()),
        image_size=image_size,
        eval_crop_ratio=crop_ratio_for(image_size, resize_size, foreign.DEFAULT_CROP_RATIO),
        interpolation=transforms.interpolation.value,
        mean=as_rgb(transforms.mean),
        std=as_rgb(transforms.std),
        origin=name,
    )


def _is_repository(checkpoint: str) -> bool:
    """True for USER/NAME, unless the first part is a folder here or the name ends like a weights file."""
    path = Path(checkpoint)
    is_file_name = path.suffix in (".pth", ".pt", ".safetensors", ".onnx", ".pt2")
    return bool(REPOSITORY.fullmatch(checkpoint)) and not is_file_name and not path.parent.exists()


def download(
    repository: str, *, revision: str | None = None, names: Iterable[str] = tuple(MAX_BYTES), **client_options: Any
) -> Path:
    """Download weights and JSON files of a repository to the client's cache; a pickle only if it has no safetensors.

    Args:
        repository: USER/NAME.
        names: the files to download; those that the repository does not have are skipped.
        client_options: `token`, `cache_dir`, `force_download` … of huggingface_hub's snapshot_download.

    Raises:
        UserError: if there is no such repository, it cannot be reached, or a file is larger than MAX_BYTES.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the error below contains what the client would log about its retries
    wanted, reason = set(names), None
    try:
        tree = HfApi(token=client_options.get("token")).list_repo_tree(repository, revision=revision)
        sizes = {each.path: each.size for each in tree if hasattr(each, "size")}
    except Exception as error:  # the client's errors have no common base class
        reason = error
        client_options["local_files_only"] = True  # files of unknown size are only taken from the cache
        sizes = {}
    if WEIGHTS_NAME in sizes:
        wanted.discard(PICKLE_NAME)
    for name in wanted & sizes.keys():
        if sizes[name] > MAX_BYTES[name]:
            raise UserError(
                f"{repository}: {name} has {file_size(sizes[name])}, more than the limit of "
                f"{file_size(MAX_BYTES[name])}; if you trust it, download it yourself and give its path"
            )
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=sorted(wanted), **client_options))
    except Exception as error:
        reason = reason or error
        raise UserError(
            f"{repository} is not a file or folder here, and no such repository could be downloaded "
            f"({first_line(reason.__cause__ or reason)})"
        ) from None
