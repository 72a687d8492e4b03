"""Gray levels to the values that the network sees."""

import functools

import torch
from torch import Tensor

from resnet_in1k.utils import imagenet

RGB = tuple[float, float, float]


def normalize(images: Tensor, mean: RGB = imagenet.MEAN, std: RGB = imagenet.STD) -> Tensor:
    """Subtract the mean and divide by the standard deviation, by default ImageNet's.

    Args:
        images: (B, 3, H, W) uint8, or float from 0 to 255.
        mean, std: per channel, for values from 0 to 1.

    Returns:
        (B, 3, H, W) float32, channels_last.
    """
    means, stds = _in_gray_levels(images.device, mean, std)
    return images.to(torch.float32, memory_format=torch.channels_last).sub(means).div_(stds)


def mean_color(device: torch.device) -> Tensor:
    """ImageNet's mean color in gray levels, (3, 1, 1): `normalize` maps it to 0."""
    return _in_gray_levels(device, imagenet.MEAN, imagenet.STD)[0]


@functools.cache
def _in_gray_levels(device: torch.device, mean: RGB, std: RGB) -> tuple[Tensor, Tensor]:
    # Cached, because a new tensor from Python numbers makes the host wait for the device.
    means, stds = (torch.tensor(values, device=device) * 255 for values in (mean, std))
    return means.view(3, 1, 1), stds.view(3, 1, 1)
