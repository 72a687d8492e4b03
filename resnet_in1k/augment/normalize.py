"""Gray levels to the values that the network sees."""

import functools

import torch
from torch import Tensor

from resnet_in1k.utils import imagenet

RGB = tuple[float, float, float]


def normalize(images: Tensor, mean: RGB = imagenet.MEAN, std: RGB = imagenet.STD) -> Tensor:
    """(B, 3, H, W) uint8, or float of 0 to 255, to float32 in channels_last: less the mean, over the standard
    deviation, both of values from 0 to 1; by default ImageNet's."""
    means, stds = _in_grey_levels(images.device, mean, std)
    return images.to(torch.float32, memory_format=torch.channels_last).sub(means).div_(stds)


def mean_color(device: torch.device) -> Tensor:
    """ImageNet's, in gray levels, (3, 1, 1): what `normalize` makes 0."""
    return _in_grey_levels(device, imagenet.MEAN, imagenet.STD)[0]


@functools.cache
def _in_grey_levels(device: torch.device, mean: RGB, std: RGB) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) each; made once, as making them makes the host wait for the device."""
    means, stds = (torch.tensor(values, device=device) * 255 for values in (mean, std))
    return means.view(3, 1, 1), stds.view(3, 1, 1)
