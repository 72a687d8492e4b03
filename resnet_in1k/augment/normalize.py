"""Gray levels to the values that the network sees."""

import functools

import torch
from torch import Tensor

from resnet_in1k.utils import imagenet
from resnet_in1k.utils.imagenet import RGB


def normalize(images: Tensor, mean: RGB = imagenet.MEAN, std: RGB = imagenet.STD, out: Tensor | None = None) -> Tensor:
    """Subtract the mean and divide by the standard deviation, by default ImageNet's.

    Args:
        images: (B, 3, H, W) uint8, or float from 0 to 255.
        mean, std: per channel, for values from 0 to 1.
        out: where to write the result.

    Returns:
        (B, 3, H, W) float32, channels_last.
    """
    means, stds = in_gray_levels(images.device, mean, std)
    return torch.sub(images.to(torch.float32, memory_format=torch.channels_last), means, out=out).div_(stds)


@functools.cache
def in_gray_levels(device: torch.device, *values: RGB) -> list[Tensor]:
    """Return each triple as a (3, 1, 1) tensor of gray levels."""
    # Cached, because a new tensor from Python numbers makes the host wait for the device.
    return [torch.tensor(rgb, device=device).view(3, 1, 1) * 255 for rgb in values]
