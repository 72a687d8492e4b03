"""config.json of a published repository, as this project, timm and transformers write it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from resnet_in1k.model.resnet import LAYOUTS
from resnet_in1k.recipes.recipe import Interpolation, crop_ratio_for
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError

CONFIG_NAME, PREPROCESSOR_NAME = "config.json", "preprocessor_config.json"
PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}
"""By number, as transformers' processors name them."""
WARPED_FROM = 384
"""transformers' ConvNextImageProcessor crops nothing of images from this size on, but distorts them."""


DEFAULT_IMAGE_SIZE, DEFAULT_CROP_RATIO = 224, 0.875
MAX_IMAGE_SIZE, MIN_CROP_RATIO = 4096, 0.1
"""An image of that size takes a gigabyte in a ResNet-50; a batch of them would take any machine's memory."""


RGB = tuple[float, float, float]


@dataclass(frozen=True)
class PublishedConfig:
    """What a config.json says; sizes, ratio and names as they stand there, for the reader to check."""

    image_size: int
    eval_crop_ratio: float
    interpolation: Interpolation
    mean: RGB = imagenet.MEAN
    std: RGB = imagenet.STD
    class_names: list[str] | None = None
    """Folder names if it has those of ImageNet-1k or names none for 1000 classes; None if it names none for others."""


def check_size(size: object, what: str, at_most: int, file: Path) -> None:
    """Raises UserError for what no image can have as its side."""
    if type(size) is not int or not 1 <= size <= at_most:  # True is an int by inheritance
        raise UserError(f"beside {file}: {what} {size!r:.40}; must be a whole number from 1 to {at_most}")


def read_published_config(folder: Path) -> PublishedConfig | None:
    """None if there is no config.json.

    Raises:
        UserError: if it is of no ResNet that is computed as torchvision's, if its images are prepared as none are here,
            or if it is incomplete.
    """
    file = folder / CONFIG_NAME
    config = files.read_json_object(file)
    if config is None:
        return None
    try:
        if config.get("model_type") == "resnet":
            return _of_transformers(config, files.read_json_object(folder / PREPROCESSOR_NAME) or {}, file)
        if "pretrained_cfg" in config:
            return _of_timm(config, file)
        names = _folder_names(config.get("label_names"), None)
        return PublishedConfig(DEFAULT_IMAGE_SIZE, DEFAULT_CROP_RATIO, "bilinear", class_names=names) if names else None
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file} is incomplete ({type(error).__name__}: {error})") from None


def _of_timm(config: dict[str, Any], file: Path) -> PublishedConfig:
    """timm's, and this project's, which are read by timm.

    timm's validate.py evaluates at the size and crop that are recorded for testing, if there are such.
    """
    architecture, settings = config.get("architecture"), config["pretrained_cfg"]
    if architecture is not None and architecture not in LAYOUTS:
        raise UserError(f"{file}: timm's {architecture} is none of {', '.join(LAYOUTS)}; use timm for it")
    mode = settings.get("crop_mode") or "center"
    if mode != "center":
        raise UserError(f"{file}: made for images cropped by timm's mode {mode}; use timm for it")
    channels, height, width = settings.get("test_input_size") or settings["input_size"]
    if channels != 3 or height != width:
        raise UserError(f"{file}: made for images of {channels!r:.9} × {height!r:.9} × {width!r:.9}, no RGB squares")
    return PublishedConfig(
        image_size=height,
        eval_crop_ratio=settings.get("test_crop_pct") or settings.get("crop_pct", DEFAULT_CROP_RATIO),
        interpolation=_interpolation(settings.get("interpolation") or "bicubic", file),
        mean=as_rgb(settings.get("mean") or imagenet.MEAN),
        std=as_rgb(settings.get("std") or imagenet.STD, above=0),
        class_names=_folder_names(
            config.get("label_names") or settings.get("label_names"),
            config.get("num_classes") or settings.get("num_classes"),
        ),
    )


def _of_transformers(config: dict[str, Any], processor: dict[str, Any], file: Path) -> PublishedConfig:
    """transformers' ResNetForImageClassification, with its image processor's settings."""
    for name, only in (
        ("hidden_act", "relu"),
        ("downsample_in_first_stage", False),
        ("downsample_in_bottleneck", False),
    ):
        if config.get(name, only) != only:
            raise UserError(f"{file}: {name} is {config[name]}, unlike torchvision's ResNets; use transformers for it")
    size = processor.get("size", DEFAULT_IMAGE_SIZE)
    if isinstance(size, dict):
        if "shortest_edge" not in size:
            raise UserError(f"{file}: made for distorted images, {size}; use transformers for it")
        size = size["shortest_edge"]
    check_size(size, "size", MAX_IMAGE_SIZE, file)
    image_size, crop_ratio = size, processor.get("crop_pct", DEFAULT_CROP_RATIO)
    if processor.get("do_center_crop") and "crop_size" in processor:
        crop = processor["crop_size"]
        image_size = crop["height"] if isinstance(crop, dict) else crop
        check_size(image_size, "crop size", size, file)
        crop_ratio = crop_ratio_for(image_size, size, image_size / size)
    elif size >= WARPED_FROM:
        raise UserError(f"{file}: made for distorted images of {size} px; use transformers for it")
    labels = config.get("id2label") or {}
    return PublishedConfig(
        image_size=image_size,
        eval_crop_ratio=crop_ratio,
        interpolation=_interpolation(PILLOW_FILTERS.get(processor.get("resample", 3), "another"), file),
        mean=as_rgb(processor.get("image_mean") or imagenet.MEAN),
        std=as_rgb(processor.get("image_std") or imagenet.STD, above=0),
        class_names=_folder_names([labels[key] for key in sorted(labels, key=int)], config.get("num_labels")),
    )


def _folder_names(names: Any, num_classes: Any) -> list[str] | None:
    if not names and num_classes == 1000:
        return list(imagenet.names_by_wnid())  # timm names no classes of its ImageNet-1k weights
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return imagenet.wnids_of(names) or names or None
    return names or None


def _interpolation(name: str, file: Path) -> Interpolation:
    if name not in get_args(Interpolation):
        raise UserError(f"{file}: made for images resized by {name} interpolation; use timm for it")
    return name  # type: ignore[return-value]


def as_rgb(values: Any, above: float = -math.inf) -> RGB:
    """Raises ValueError for what are not three numbers above that."""
    red, green, blue = (float(value) for value in values)
    if not all(above < value < math.inf for value in (red, green, blue)):
        raise ValueError(f"mean or std {values!r:.60}")
    return red, green, blue
