"""Weights of other projects: their key names, their config.json, and torchvision's downloads."""

import re
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import torch
from torchvision.models import WeightsEnum, get_model_weights

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.recipes.recipe import Architecture, resize_size_for
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

CONFIG_NAME, PREPROCESSOR_NAME = "config.json", "preprocessor_config.json"
TORCHVISION = "torchvision/"
ARCHITECTURES = get_args(Architecture)
DEFAULT_IMAGE_SIZE, DEFAULT_CROP_RATIO = 224, 0.875  # center crop of an image resized to 256 px
PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Values of `resample` in transformers' preprocessor_config.json."""
WARPED_FROM = 384
"""transformers' ConvNextImageProcessor resizes to a square, without a crop, from this size on."""

Config = tuple[EvalPreprocessing, list[str] | None]
"""Preprocessing and class names, as they are in a config.json: `model/resolve.py` checks the values. The names are
WordNet ids for ImageNet-1k's classes, also if the file names no classes but has 1000 of them."""


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


def read_foreign_config(folder: Path) -> Config | None:
    """Read the config.json of timm, transformers or this project; None if there is none.

    Raises:
        UserError: if the model differs from torchvision's ResNets, if its images are prepared in a way that is not
            implemented here, or if the file is incomplete.
    """
    file = folder / CONFIG_NAME
    config = files.read_json_object(file) or {}
    with files.content_errors(file):
        if config.get("model_type") == "resnet":
            return _from_transformers(config, files.read_json_object(folder / PREPROCESSOR_NAME) or {}, file)
        return _from_timm(config, file) if "pretrained_cfg" in config else None


def _from_timm(config: dict[str, Any], file: Path) -> Config:
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
    preprocessing = EvalPreprocessing(
        image_size=height,
        resize_size=resize_size_for(
            height, settings.get("test_crop_pct") or settings.get("crop_pct", DEFAULT_CROP_RATIO)
        ),
        interpolation=settings.get("interpolation") or "bicubic",
        mean=settings.get("mean") or imagenet.MEAN,
        std=settings.get("std") or imagenet.STD,
    )
    names, num_classes = (config.get(name) or settings.get(name) for name in ("label_names", "num_classes"))
    return preprocessing, _class_names(names, num_classes)


def _from_transformers(config: dict[str, Any], processor: dict[str, Any], file: Path) -> Config:
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
    image_size, resize_size = size, resize_size_for(size, processor.get("crop_pct", DEFAULT_CROP_RATIO))
    if processor.get("do_center_crop") and "crop_size" in processor:
        crop = processor["crop_size"]
        image_size, resize_size = crop["height"] if isinstance(crop, dict) else crop, size
    elif size >= WARPED_FROM:
        raise UserError(f"{file}: made for images resized to {size} px without a crop; use transformers for it")
    preprocessing = EvalPreprocessing(
        image_size=image_size,
        resize_size=resize_size,
        interpolation=PILLOW_FILTERS.get(processor.get("resample", 3), "another"),
        mean=processor.get("image_mean") or imagenet.MEAN,
        std=processor.get("image_std") or imagenet.STD,
    )
    labels = config.get("id2label") or {}
    return preprocessing, _class_names([labels[key] for key in sorted(labels, key=int)], config.get("num_labels"))


def _class_names(names: Any, num_classes: Any) -> list[str] | None:
    if not names and num_classes == 1000:
        return list(imagenet.names_by_wnid())  # timm's ImageNet-1k weights come without class names
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return imagenet.wnids_of(names) or names or None
    return names or None  # of another type: rejected by the reader


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
    """Return the file in torch.hub's cache; raises UserError if it is not there and cannot be downloaded."""
    url = str(weights.url)
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    digits = file.stem.rpartition("-")[2]  # its name ends with the first digits of its sha256
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), digits, progress=False)
        except Exception as error:  # from urllib, the disk, or torch if the sha256 is wrong
            raise UserError(
                f"{name} could not be downloaded from {url} ({first_line(error)}); without a network, copy the file to "
                f"{file.parent}"
            ) from None
    if not files.sha256_of(file).startswith(digits):
        raise UserError(f"{file} is damaged: its sha256 does not begin with {digits}; remove it and try again")
    return file
