"""Weights of other projects: their key names, their config.json, and torchvision's downloads."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import torch
from torchvision.models import WeightsEnum, get_model_weights

from resnet_in1k.recipes.recipe import Architecture, Interpolation, crop_ratio_for
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

CONFIG_NAME, PREPROCESSOR_NAME = "config.json", "preprocessor_config.json"
TORCHVISION = "torchvision/"
ARCHITECTURES = get_args(Architecture)
DEFAULT_IMAGE_SIZE, DEFAULT_CROP_RATIO = 224, 0.875  # center crop of an image resized to 256 px
MAX_IMAGE_SIZE, MIN_CROP_RATIO = 4096, 0.1
"""An image of that size takes 1 GB in a ResNet-50; larger ones could exhaust the memory of any machine."""
PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Values of `resample` in transformers' preprocessor_config.json."""
WARPED_FROM = 384
"""transformers' ConvNextImageProcessor resizes to a square, without a crop, from this size on."""

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class ForeignConfig:
    """Preprocessing and class names in a config.json; the reader checks sizes, crop ratio and names."""

    image_size: int = DEFAULT_IMAGE_SIZE
    eval_crop_ratio: float = DEFAULT_CROP_RATIO
    interpolation: Interpolation = "bilinear"
    mean: RGB = imagenet.MEAN
    std: RGB = imagenet.STD
    class_names: list[str] | None = None
    """WordNet ids for ImageNet-1k's classes, also if the file names no classes but has 1000 of them."""


def torchvision_key(key: str) -> str:
    """Rename a tensor of transformers' ResNetForImageClassification; other keys are returned unchanged."""
    parts = {"convolution": "conv", "normalization": "bn"}
    if match := re.fullmatch(r"resnet\.embedder\.embedder\.(convolution|normalization)\.(\w+)", key):
        return f"{parts[match[1]]}1.{match[2]}"
    pattern = r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(layer\.\d+|shortcut)\.(\w+)\.(\w+)"
    if match := re.fullmatch(pattern, key):
        stage, block, layer, part, tensor = match.groups()
        is_shortcut = layer == "shortcut"
        name = f"downsample.{int(part == 'normalization')}" if is_shortcut else f"{parts[part]}{int(layer[6:]) + 1}"
        return f"layer{int(stage) + 1}.{block}.{name}.{tensor}"
    return re.sub(r"^classifier\.1\.", "fc.", key)


def read_foreign_config(folder: Path) -> ForeignConfig | None:
    """Read the config.json of timm, transformers or this project; None if there is none.

    Raises:
        UserError: if the model differs from torchvision's ResNets, if its images are prepared in a way that is not
            implemented here, or if the file is incomplete.
    """
    file = folder / CONFIG_NAME
    config = files.read_json_object(file)
    if config is None:
        return None
    try:
        if config.get("model_type") == "resnet":
            return _from_transformers(config, files.read_json_object(folder / PREPROCESSOR_NAME) or {}, file)
        if "pretrained_cfg" in config:
            return _from_timm(config, file)
        names = _class_names(config.get("label_names"), None)
        return ForeignConfig(class_names=names) if names else None
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file} is incomplete ({type(error).__name__}: {error})") from None


def _from_timm(config: dict[str, Any], file: Path) -> ForeignConfig:
    """Read a config.json of timm or this project, with the size and crop that timm's validate.py uses."""
    architecture, settings = config.get("architecture"), config["pretrained_cfg"]
    if architecture is not None and architecture not in ARCHITECTURES:
        raise UserError(f"{file}: timm's {architecture} is not one of {', '.join(ARCHITECTURES)}; use timm for it")
    mode = settings.get("crop_mode") or "center"
    if mode != "center":
        raise UserError(f"{file}: made for images cropped by timm's mode {mode}; use timm for it")
    channels, height, width = settings.get("test_input_size") or settings["input_size"]
    if channels != 3 or height != width:
        raise UserError(f"{file}: made for images of {channels!r:.9} × {height!r:.9} × {width!r:.9}, not RGB squares")
    return ForeignConfig(
        image_size=height,
        eval_crop_ratio=settings.get("test_crop_pct") or settings.get("crop_pct", DEFAULT_CROP_RATIO),
        interpolation=_interpolation(settings.get("interpolation") or "bicubic", file),
        mean=as_rgb(settings.get("mean") or imagenet.MEAN),
        std=as_rgb(settings.get("std") or imagenet.STD, above=0),
        class_names=_class_names(
            config.get("label_names") or settings.get("label_names"),
            config.get("num_classes") or settings.get("num_classes"),
        ),
    )


def _from_transformers(config: dict[str, Any], processor: dict[str, Any], file: Path) -> ForeignConfig:
    """Read the config.json of ResNetForImageClassification and the settings of its image processor."""
    required = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    for name, value in required.items():
        if config.get(name, value) != value:
            raise UserError(f"{file}: {name} is {config[name]}, unlike torchvision's ResNets; use transformers for it")
    size = processor.get("size", DEFAULT_IMAGE_SIZE)
    if isinstance(size, dict):
        if "shortest_edge" not in size:
            raise UserError(f"{file}: made for images resized to {size} without a crop; use transformers for it")
        size = size["shortest_edge"]
    check_size(size, "size", MAX_IMAGE_SIZE, file)
    image_size, crop_ratio = size, processor.get("crop_pct", DEFAULT_CROP_RATIO)
    if processor.get("do_center_crop") and "crop_size" in processor:
        crop = processor["crop_size"]
        image_size = crop["height"] if isinstance(crop, dict) else crop
        check_size(image_size, "crop size", size, file)
        crop_ratio = crop_ratio_for(image_size, size, image_size / size)
    elif size >= WARPED_FROM:
        raise UserError(f"{file}: made for images resized to {size} px without a crop; use transformers for it")
    labels = config.get("id2label") or {}
    return ForeignConfig(
        image_size=image_size,
        eval_crop_ratio=crop_ratio,
        interpolation=_interpolation(PILLOW_FILTERS.get(processor.get("resample", 3), "another"), file),
        mean=as_rgb(processor.get("image_mean") or imagenet.MEAN),
        std=as_rgb(processor.get("image_std") or imagenet.STD, above=0),
        class_names=_class_names([labels[key] for key in sorted(labels, key=int)], config.get("num_labels")),
    )


def _class_names(names: Any, num_classes: Any) -> list[str] | None:
    if not names and num_classes == 1000:
        return list(imagenet.names_by_wnid())  # timm's ImageNet-1k weights come without class names
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return imagenet.wnids_of(names) or names or None
    return names or None  # of another type: rejected by Weights


def _interpolation(name: str, file: Path) -> Interpolation:
    if name not in get_args(Interpolation):
        raise UserError(f"{file}: made for images resized by {name} interpolation; use timm for it")
    return name  # type: ignore[return-value]


def check_size(size: object, what: str, at_most: int, file: Path) -> None:
    """Raise UserError unless `size` is a possible side of an image, in pixels."""
    if type(size) is not int or not 1 <= size <= at_most:  # isinstance would accept True
        raise UserError(f"{file}: {what} {size!r:.40} is not an integer from 1 to {at_most}")


def as_rgb(values: Any, above: float = -math.inf) -> RGB:
    """Convert three numbers to floats; raises ValueError unless all are finite and greater than `above`."""
    red, green, blue = (float(value) for value in values)
    if not all(above < value < math.inf for value in (red, green, blue)):
        raise ValueError(f"mean or std {values!r:.60}")
    return red, green, blue


def torchvision_weights(name: str) -> WeightsEnum:
    """Find `torchvision/MODEL.WEIGHTS`, or torchvision's default weights for `torchvision/MODEL`.

    Raises:
        UserError: if torchvision has no such weights, or the model is not a ResNet of this project.
    """
    architecture, _, tag = name.removeprefix(TORCHVISION).partition(".")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{name}: {architecture} is not one of {', '.join(ARCHITECTURES)}")
    known = get_model_weights(architecture)
    if (tag or "DEFAULT") not in known.__members__:
        raise UserError(f"{name}: torchvision has {', '.join(f'{architecture}.{each.name}' for each in known)}")
    return known[tag or "DEFAULT"]


def download_torchvision_weights(name: str, weights: WeightsEnum) -> Path:
    """Return the file in torch.hub's cache, downloaded if necessary.

    Raises:
        UserError: if the download fails, or the file's sha256 does not begin with the digits in its name.
    """
    url = str(weights.url)
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    match = re.search(r"-([a-f0-9]*)\.", file.name)  # torch.hub's convention
    expected = match[1] if match else ""
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), expected or None, progress=False)
        except Exception as error:  # from urllib, the disk, or torch if the sha256 is wrong
            raise UserError(
                f"{name} could not be downloaded from {url} ({first_line(error)}); without a network, copy the file to "
                f"{file.parent}"
            ) from None
    if not files.sha256_of(file).startswith(expected):
        raise UserError(f"{file} is damaged: its sha256 does not begin with {expected}; remove it and try again")
    return file
