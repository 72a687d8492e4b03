"""Augmentation on the device, one batch at a time, each image with its own parameters.

Each operation gives what torchvision's functional of the same name gives for one image, but for the rounding to whole
grey levels that torchvision does after each; here the values stay float from the first operation to the last.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from resnet_in1k import randomness
from resnet_in1k.randomness import Stream
from resnet_in1k.recipes import Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CPU_CHUNK = 4
"""Images augmented at a time on a CPU: what stays in its cache from one operation to the next is twice as fast."""

COLOUR_OPERATIONS = ("brightness", "contrast", "saturation", "hue")


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8, or float of 0 to 255, to float32 in channels_last: less ImageNet's mean, over its std."""
    mean, std = _mean_and_std(images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).sub(mean).div(std)


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """In grey levels, (3, 1, 1) each; made once, as making them makes the host wait for the device."""
    mean, std = (torch.tensor(values, device=device) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean.view(3, 1, 1), std.view(3, 1, 1)


@dataclass(frozen=True)
class Draws:
    """What was drawn for a batch: one value per image, on the CPU, so that choosing by them needs no device sync."""

    hflip: Tensor
    """(B,) bool: mirrored or not."""
    degrees: Tensor
    """(B,) float32: rotation, counter-clockwise."""
    factors: dict[str, Tensor]
    """By colour operation, (B,) float32: a multiplier; for hue a shift in turns. Only those that are in use."""
    order: Tensor
    """(B, 4) int64: each image's own order of COLOUR_OPERATIONS."""

    def __getitem__(self, rows: slice) -> "Draws":
        factors = {name: factor[rows] for name, factor in self.factors.items()}
        return Draws(self.hflip[rows], self.degrees[rows], factors, self.order[rows])


def draw(recipe: Recipe, step: int) -> Draws:
    """The draws for the whole global batch of a step, a function of (recipe.seed, step)."""
    size = recipe.global_batch_size
    generator = randomness.generator(recipe.seed, Stream.AUGMENT, step)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(size).uniform_(low, high, generator=generator)

    def jitter(width: float) -> Tensor:
        return uniform(1 - width, 1 + width)

    # Every value is drawn, used or not: switching one operation off leaves the others' draws as they were.
    hflip = torch.rand(size, generator=generator) < recipe.hflip_probability
    degrees = uniform(-recipe.rotation_degrees, recipe.rotation_degrees)
    factors = {
        "brightness": jitter(recipe.brightness),
        "contrast": jitter(recipe.contrast),
        "saturation": jitter(recipe.saturation),
        "hue": uniform(-recipe.hue, recipe.hue),
    }
    order = torch.rand(size, len(COLOUR_OPERATIONS), generator=generator).argsort(dim=1)
    return Draws(hflip, degrees, {name: factors[name] for name in factors if getattr(recipe, name) > 0}, order)


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Mirror, rotate, jitter colours in each image's own order, normalise.

    Args:
        images: (B, 3, S, S) uint8.
        draws: for these B images.

    Returns:
        (B, 3, S, S) float32, channels_last, normalised.
    """
    if images.device.type == "cpu" and len(images) > CPU_CHUNK:
        chunks = [slice(start, start + CPU_CHUNK) for start in range(0, len(images), CPU_CHUNK)]
        return torch.cat([augment(images[rows], draws[rows]) for rows in chunks])
    pixels = images.to(torch.float32)
    if draws.hflip.any():
        pixels = hflip(pixels, _to(draws.hflip, pixels))
    if draws.degrees.any():
        pixels = rotate(pixels, _to(draws.degrees, pixels))
    if draws.factors:
        _jitter_(pixels, draws)
    return normalise(pixels)


def _to(parameters: Tensor, pixels: Tensor) -> Tensor:
    """A copy from pinned memory does not make the host wait for the device."""
    if pixels.device.type == "cuda":
        parameters = parameters.pin_memory()
    return parameters.to(pixels.device, non_blocking=True)


def hflip(pixels: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images where `mirrored`, (B,) bool, says so."""
    return torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


def rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each image about its centre, counter-clockwise; nearest pixel, black outside, as torchvision's default.

    Args:
        pixels: (B, C, S, S) float32.
        degrees: (B,) float32.
    """
    assert pixels.shape[-1] == pixels.shape[-2], "the grid below is that of a square"
    radians = degrees * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # Where each output pixel comes from, in coordinates from -1 to 1: (B, 2, 3).
    inverse = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = affine_grid(inverse, list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def grey(pixels: Tensor) -> Tensor:
    """Luma by ITU-R 601-2 in whole grey levels as torchvision takes it, (B, 3, H, W) to (B, 1, H, W)."""
    red, green, blue = pixels.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor().unsqueeze(1)


def _blend(pixels: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    weight = factor.view(-1, 1, 1, 1)
    return (weight * pixels + (1 - weight) * other).clamp(0, 255)


def adjust_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(pixels, 0.0, factor)


def adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Towards or away from the image's own mean grey."""
    mean = grey(pixels).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(pixels, mean, factor)


def adjust_saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(pixels, grey(pixels), factor)


def adjust_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by `turns` of the colour circle, (B,), keeping saturation and value.

    Between red, yellow, green … a hue runs along one edge of a hexagon, so a channel of a fully saturated colour is a
    trapezoid of the hue; chroma scales it and value lifts it (https://en.wikipedia.org/wiki/HSL_and_HSV).
    """
    value, _ = pixels.max(dim=1)  # (B, H, W)
    chroma = value - pixels.amin(dim=1)
    red, green, blue = pixels.unbind(dim=1)
    divisor = torch.where(chroma == 0, 1.0, chroma)  # a grey pixel has no hue; any will do, its chroma is 0
    sixths = torch.where(
        red == value,
        (green - blue) / divisor,
        torch.where(green == value, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixths = sixths + 6 * turns.view(-1, 1, 1)

    def channel(offset: int) -> Tensor:
        place = (sixths + offset) % 6
        return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1)


ADJUST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def _jitter_(pixels: Tensor, draws: Draws) -> None:
    """In place. At each of four turns, gather the images that have the same operation next, and do it for all."""
    for turn in range(len(COLOUR_OPERATIONS)):
        for operation, name in enumerate(COLOUR_OPERATIONS):
            rows = (draws.order[:, turn] == operation).nonzero().flatten()
            if name in draws.factors and len(rows):
                factor, rows = _to(draws.factors[name][rows], pixels), _to(rows, pixels)
                pixels.index_copy_(0, rows, ADJUST[name](pixels[rows], factor))
