"""Grey levels to the values that the network sees."""

import functools

import torch
from torch import Tensor

from resnet_in1k.core import imagenet


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8, or float of 0 to 255, to float32 in channels_last: less ImageNet's mean, over its std."""
    mean, std = _mean_and_std(images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).sub(mean).div_(std)


def mean_colour(device: torch.device) -> Tensor:
    """ImageNet's, in grey levels, (3, 1, 1): what `normalise` makes 0."""
    return _mean_and_std(device)[0]


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """In grey levels, (3, 1, 1) each; made once, as making them makes the host wait for the device."""
    mean, std = (torch.tensor(values, device=device) * 255 for values in (imagenet.MEAN, imagenet.STD))
    return mean.view(3, 1, 1), std.view(3, 1, 1)
