"""Tensor names of other libraries' ResNets as torchvision's."""

import re
from collections.abc import Mapping

from torch import Tensor

_PARTS = {"convolution": "conv", "normalization": "bn"}
_STEM = re.compile(r"resnet\.embedder\.embedder\.(convolution|normalization)\.(\w+)")
_LAYER = re.compile(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.(convolution|normalization)\.(\w+)")
_SHORTCUT = re.compile(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.(convolution|normalization)\.(\w+)")


def torchvision_key(key: str) -> str:
    """That of transformers' ResNetForImageClassification; any other stays as it is."""
    if match := _STEM.fullmatch(key):
        part, tensor = match.groups()
        return f"{_PARTS[part]}1.{tensor}"
    if match := _LAYER.fullmatch(key):
        stage, block, layer, part, tensor = match.groups()
        return f"layer{int(stage) + 1}.{block}.{_PARTS[part]}{int(layer) + 1}.{tensor}"
    if match := _SHORTCUT.fullmatch(key):
        stage, block, part, tensor = match.groups()
        return f"layer{int(stage) + 1}.{block}.downsample.{int(part == 'normalization')}.{tensor}"
    return key.replace("classifier.1.", "fc.") if key.startswith("classifier.1.") else key


def with_torchvision_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {torchvision_key(key): tensor for key, tensor in state.items()}
