"""Weights of other projects: the preprocessing and class names in their config.json, and torchvision's downloads.

They are returned as in eval.json: `class_names` and the fields of EvalPreprocessing, which `model/resolve.py` checks.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import torch
from torchvision.models import get_model_weights

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.model.state_dict import LAYOUTS
from resnet_in1k.recipes.recipe import Architecture, crop_ratio_for, resize_size_for
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

CONFIG_NAME, PREPROCESSOR_NAME = "config.json", "preprocessor_config.json"
TORCHVISION = "torchvision/"
ARCHITECTURES = get_args(Architecture)
DEFAULT_CROP_RATIO = 0.875  # center crop of 224 px from an image resized to 256 px
PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of timm, transformers or this project; {} if there is none. Raises UserError if the model
    differs from torchvision's ResNets, its images are prepared in a way that is not implemented here, or the file is
    incomplete."""
    file = folder / CONFIG_NAME
    config = files.read_json_object(file) or {}
    with files.content_errors(file):
        if config.get("model_type") == "resnet":
            return _from_transformers(config, files.read_json_object(folder / PREPROCESSOR_NAME) or {}, file)
        return _from_timm(config, file) if "pretrained_cfg" in config else {}


def _from_timm(config: dict[str, Any], file: Path) -> dict[str, Any]:
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
    crop_ratio = settings.get("test_crop_pct") or settings.get("crop_pct", DEFAULT_CROP_RATIO)
    names, num_classes = (config.get(name) or settings.get(name) for name in ("label_names", "num_classes"))
    return {
        "image_size": height,
        "resize_size": resize_size_for(height, crop_ratio),
        "interpolation": settings.get("interpolation") or "bicubic",
        "mean": settings.get("mean") or imagenet.MEAN,
        "std": settings.get("std") or imagenet.STD,
        "class_names": _class_names(names, num_classes),
    }


def _from_transformers(config: dict[str, Any], processor: dict[str, Any], file: Path) -> dict[str, Any]:
    """Read the config.json of ResNetForImageClassification and the settings of its image processor."""
    required = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    for name, value in required.items():
        if config.get(name, value) != value:
            raise UserError(f"{file}: {name} is {config[name]}, unlike torchvision's ResNets; use transformers for it")
    size = processor.get("size", 224)
    size = size.get("shortest_edge", size) if isinstance(size, dict) else size
    if processor.get("do_center_crop") and "crop_size" in processor:
        crop = processor["crop_size"]
        image_size, resize_size = crop["height"] if isinstance(crop, dict) else crop, size
    elif isinstance(size, dict) or size >= 384:  # from there on ConvNextImageProcessor resizes to a square
        raise UserError(f"{file}: made for images resized to {size} px without a crop; use transformers for it")
    else:
        image_size, resize_size = size, resize_size_for(size, processor.get("crop_pct", DEFAULT_CROP_RATIO))
    labels = config.get("id2label") or {}
    return {
        "image_size": image_size,
        "resize_size": resize_size,
        "interpolation": PILLOW_FILTERS.get(processor.get("resample", 3), "another"),
        "mean": processor.get("image_mean") or imagenet.MEAN,
        "std": processor.get("image_std") or imagenet.STD,
        "class_names": _class_names([labels[key] for key in sorted(labels, key=int)], config.get("num_labels")),
    }


def _class_names(names: Any, num_classes: Any) -> Any:
    """Return the names; WordNet ids for ImageNet-1k's classes, also if there are no names but 1000 classes; None for
    the numbered names that transformers and this project write for classes without names."""
    if names in ([f"{word}{number}" for number in range(len(names or []))] for word in ("LABEL_", "class ")):
        return None
    if names:
        return imagenet.wnids_of(names) or names
    return list(imagenet.names_by_wnid()) if num_classes == 1000 else None  # timm's have no names


def make_config(
    architecture: Architecture, class_names: Sequence[str], preprocessing: EvalPreprocessing, tag: str, license: str
) -> dict[str, Any]:
    """Return config.json for timm and transformers, and for `read_config`. The class names are readable ones."""
    size, counts = preprocessing.image_size, {"num_classes": len(class_names)}
    settings = {"tag": tag, "custom_load": False, "input_size": [3, size, size], "fixed_input_size": False, **counts}
    settings |= {"interpolation": preprocessing.interpolation, "mean": preprocessing.mean, "std": preprocessing.std}
    settings |= {"crop_pct": crop_ratio_for(size, preprocessing.resize_size), "crop_mode": "center"}
    settings |= {"pool_size": [math.ceil(size / 32)] * 2, "first_conv": "conv1", "classifier": "fc"}
    settings |= {"license": license} if license else {}
    counts["num_features"] = 512 * LAYOUTS[architecture][0].expansion
    own = {"architecture": architecture, **counts, "global_pool": "avg", "label_names": list(class_names)}
    return {**own, "pretrained_cfg": settings}


def download_torchvision_weights(name: str) -> tuple[Path, dict[str, Any]]:
    """Return the file of `torchvision/MODEL.WEIGHTS` in torch.hub's cache, with its preprocessing and class names.

    Without WEIGHTS they are torchvision's default. Raises UserError if torchvision has no such weights, they cannot be
    downloaded, or the file is damaged.
    """
    architecture, _, tag = name.removeprefix(TORCHVISION).partition(".")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{name}: {architecture} is not one of {', '.join(ARCHITECTURES)}")
    known = get_model_weights(architecture).__members__
    if tag and tag not in known:
        raise UserError(f"{name}: torchvision has {', '.join(f'{architecture}.{each}' for each in known)}")
    weights = known[tag or "DEFAULT"]
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(weights.url).path).name)
    digits = file.stem.rpartition("-")[2]  # its name ends with the first digits of its sha256
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(file), digits, progress=False)
        except Exception as error:  # from urllib, the disk, or torch if the sha256 is wrong
            raise UserError(
                f"{name} could not be downloaded from {weights.url} ({first_line(error)}); without a network, copy the "
                f"file to {file.parent}"
            ) from None
    if not files.sha256_of(file).startswith(digits):
        raise UserError(f"{file} is damaged: its sha256 does not begin with {digits}; remove it and try again")
    transforms = weights.transforms()
    return file, {
        "image_size": transforms.crop_size[0],
        "resize_size": transforms.resize_size[0],
        "interpolation": transforms.interpolation.value,
        "mean": transforms.mean,
        "std": transforms.std,
        "class_names": list(imagenet.names_by_wnid()),
    }
