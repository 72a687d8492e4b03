"""Augmentation of a batch: flip, rotation, color jitter, random erasing, mixup and CutMix.

Each operation is two functions, `draw_…` and the one after it, and a line in OPERATIONS at the end.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from resnet_in1k.augment.normalize import in_gray_levels
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import imagenet

ERASED_AREAS = (0.02, 0.33)
"""Range of the erased rectangle's area, as a share of the image's."""
ERASED_ASPECT_RATIOS = (0.3, 3.3)
NUM_ATTEMPTS = 10
"""Rectangles drawn until one fits into the image; if none fits, nothing is erased."""

Draws = dict[str, Tensor]
Augmented = tuple[Tensor, Tensor]
"""Images and targets."""


class Operation(NamedTuple):
    """One augmentation for complete batches, each image with its own parameters."""

    name: str
    """Key of the random stream: operations of different names draw independently."""
    fields: tuple[str, ...]
    """Fields of the recipe; the operation is used if one of them is not 0."""
    draw: Callable[[Recipe, torch.Generator], Draws]
    """Draws the parameters of a global batch on the CPU: (B, k) float32 by a name that no other operation uses."""
    apply: Callable[[Tensor, Tensor, Draws], Augmented]
    """Augments images with these draws on their device, possibly in place. It must not read a tensor's values on the
    host (`.item()`, `.nonzero()`, `if tensor`).

    Images are (B, 3, S, S), uint8 until an operation returns float32, both from 0 to 255. Targets are class indices,
    (B,) int64, or probabilities, (B, C) float32, if the recipe mixes images: the pairs 2k and 2k + 1, which no chunk
    and no process splits."""


def uniform(generator: torch.Generator, number: int, low: float, high: float) -> Tensor:
    return torch.empty(number, 1).uniform_(low, high, generator=generator)


def draw_flip(recipe: Recipe, generator: torch.Generator) -> Draws:
    is_mirrored = torch.rand(recipe.global_batch_size, 1, generator=generator) < recipe.hflip_probability
    return {"is_mirrored": is_mirrored.float()}


def flip(images: Tensor, targets: Tensor, draws: Draws) -> Augmented:
    return torch.where(draws["is_mirrored"].bool().view(-1, 1, 1, 1), images.flip(-1), images), targets


def draw_rotation(recipe: Recipe, generator: torch.Generator) -> Draws:
    limit = recipe.rotation_degrees
    return {"degrees": uniform(generator, recipe.global_batch_size, -limit, limit)}


def rotate(images: Tensor, targets: Tensor, draws: Draws) -> Augmented:
    """Rotate counter-clockwise about the center; nearest pixel, black outside, as torchvision's default."""
    size = images.shape[-1]
    assert images.shape[-2] == size, "the grid below is that of a square"
    radians = draws["degrees"] * (math.pi / 180)
    cos, sin = radians.cos().view(-1, 1, 1), radians.sin().view(-1, 1, 1)
    # Pixel centers in coordinates from -1 to 1, and the source of each output pixel. Elementwise, because affine_grid
    # is a matrix product: a GPU may compute it in TF32, which is too coarse for coordinates.
    centers = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    x, y = centers.view(1, 1, -1), centers.view(1, -1, 1)
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)  # (B, S, S, 2)
    return grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False), targets


def draw_color_jitter(recipe: Recipe, generator: torch.Generator) -> Draws:
    """Draw the factors of the adjustments, the hue's in turns of the color wheel.

    Each image has its own factors. The images of a batch share the order of the adjustments, which is that of the
    result, so that each adjustment is one operation over the batch.
    """
    ranges = {name: (1 - getattr(recipe, name), 1 + getattr(recipe, name)) for name in ADJUSTMENTS}
    ranges["hue"] = (-recipe.hue, recipe.hue)
    # All four are drawn, so that the draws of one do not depend on whether the recipe uses the others.
    factors = [(name, uniform(generator, recipe.global_batch_size, *ranges[name])) for name in ADJUSTMENTS]
    order = torch.randperm(len(factors), generator=generator).tolist()
    return {name: values for name, values in (factors[place] for place in order) if getattr(recipe, name)}


def adjust_colors(images: Tensor, targets: Tensor, draws: Draws) -> Augmented:
    """Apply the adjustments in the order of `draws`.

    Each gives what torchvision's functional of the same name gives, except that torchvision rounds to integer gray
    levels after each one. Here the values stay float.
    """
    images = images.float().contiguous()  # the adjustments work channel by channel
    for name in draws:
        if name in ADJUSTMENTS:
            images = ADJUSTMENTS[name](images, draws[name].view(-1, 1, 1, 1))
    return images, targets


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 255)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's own mean gray level."""
    return _blend(images, grayscale(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image in gray."""
    return _blend(images, grayscale(images), factor)


def grayscale(images: Tensor) -> Tensor:
    """Luma by ITU-R 601-2 in integer gray levels as torchvision takes it, (B, 3, H, W) to (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).add_((1 - factor) * other).clamp_(0, 255)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by `turns` of the color wheel, and keep saturation and value.

    From red over yellow and green a hue runs along the edges of a hexagon, so a channel of a saturated color is a
    trapezoid over the hue. Chroma scales it and the least channel lifts it (https://en.wikipedia.org/wiki/HSL_and_HSV).
    """
    value, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)  # (B, 1, H, W)
    chroma = value - low
    red, green, blue = images.split(1, dim=1)
    divisor = chroma.clamp(min=1e-30)  # a gray pixel has no hue; any will do, because its chroma is 0
    sixths = torch.where(
        red == value,
        (green - blue).div_(divisor),
        torch.where(green == value, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4)),
    )
    # A channel's height follows from the distance of the hue to that of its complement (for red: cyan, at 3).
    # Up to a distance of 1 the height is 0, from 2 on it is 1.
    images.copy_(sixths.add_(6 * turns))
    images[:, 1].add_(4)
    images[:, 2].add_(2)
    return images.remainder_(6).sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)


ADJUSTMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}
"""Functions that change images by (B, 1, 1, 1) factors, in place, by the names of their fields in the recipe."""


def draw_erasing(recipe: Recipe, generator: torch.Generator) -> Draws:
    """Draw height and width as shares of the image's side, 0 where nothing is erased; and the position of the upper
    left corner, from 0 to 1 of the possible ones."""
    batch_size = recipe.global_batch_size
    is_erased = torch.rand(batch_size, generator=generator) < recipe.random_erasing_probability
    areas = uniform(generator, batch_size * NUM_ATTEMPTS, *ERASED_AREAS)
    log_ratios = uniform(generator, batch_size * NUM_ATTEMPTS, *(math.log(ratio) for ratio in ERASED_ASPECT_RATIOS))
    ratios = log_ratios.exp()
    sides = torch.cat([areas * ratios, areas / ratios], dim=1).sqrt().view(batch_size, NUM_ATTEMPTS, 2)
    fits = (sides < 1).all(dim=2)
    first = fits.int().argmax(dim=1)  # argmax returns the first of equal values
    sides = sides[torch.arange(batch_size), first] * (is_erased & fits.any(dim=1)).view(-1, 1)
    return {"erased_sides": sides, "erased_corner": torch.rand(batch_size, 2, generator=generator)}


def erase(images: Tensor, targets: Tensor, draws: Draws) -> Augmented:
    """Fill a rectangle with the mean color, as torchvision's RandomErasing does with its defaults after normalization
    (https://arxiv.org/abs/1708.04896)."""
    size = images.shape[-1]
    lengths = (draws["erased_sides"] * size).round().clamp(max=size - 1)
    first = (draws["erased_corner"] * (size - lengths + 1)).floor()
    mean_color, _ = in_gray_levels(images.device, imagenet.MEAN, imagenet.STD)
    return torch.where(_rectangles(first, first + lengths, size), mean_color, images), targets


def draw_mixing(recipe: Recipe, generator: torch.Generator) -> Draws:
    """Draw 1 for CutMix and 0 for mixup; the weight of the image itself; the center of CutMix's rectangle as a share of
    the side. All are equal for both images of a pair, or for the complete batch."""
    # torch has no Beta distribution that takes a generator.
    random = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
    number = recipe.global_batch_size // 2 if recipe.mix_by_pair else 1
    is_cutmix = random.random(number) < bool(recipe.cutmix_alpha) / (1 + bool(recipe.mixup_alpha))
    mixup_weight = random.beta(recipe.mixup_alpha or 1, recipe.mixup_alpha or 1, number)
    cutmix_weight = random.beta(recipe.cutmix_alpha or 1, recipe.cutmix_alpha or 1, number)
    weight, center = np.where(is_cutmix, cutmix_weight, mixup_weight), random.random((number, 2))
    drawn = torch.from_numpy(np.column_stack([is_cutmix, weight, center])).float()
    drawn = drawn.repeat_interleave(recipe.global_batch_size // number, dim=0)
    return {"is_cutmix": drawn[:, :1], "mixing_weight": drawn[:, 1:2], "cutmix_center": drawn[:, 2:]}


def mix(images: Tensor, targets: Tensor, draws: Draws) -> Augmented:
    """Mix each image with its neighbor by mixup (https://arxiv.org/abs/1710.09412) or CutMix
    (https://arxiv.org/abs/1905.04899), and so the targets, (B, C) probabilities.

    A pair gives what torchvision's v2.MixUp and v2.CutMix give for a batch of these two images. Each pixel is a
    weighted mean of the two images' pixels: mixup has the same weight everywhere, CutMix has weight 0 in a rectangle
    and 1 outside.
    """
    size = images.shape[-1]
    is_cutmix, weight = draws["is_cutmix"].bool(), draws["mixing_weight"]  # (B, 1)
    center = (draws["cutmix_center"] * size).floor()
    half = (0.5 * size * (1 - weight).sqrt()).floor()
    inside = _rectangles(center - half, center + half, size)
    weights = torch.where(is_cutmix.view(-1, 1, 1, 1), (~inside).float(), weight.view(-1, 1, 1, 1))
    # CutMix's rectangle may reach over the edge, so its weight is the share that it really covers.
    target_weights = weights.mean(dim=(2, 3)).where(is_cutmix, weight)
    mixed = images * weights + _neighbors(images) * (1 - weights)
    return mixed, targets * target_weights + _neighbors(targets) * (1 - target_weights)


def _neighbors(values: Tensor) -> Tensor:
    """(B, …) with rows 2k and 2k + 1 exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _rectangles(first: Tensor, end: Tensor, size: int) -> Tensor:
    """Masks of rectangles, (B, 1, S, S) bool.

    Args:
        first, end: (B, 2), the rows and columns at which each rectangle begins, and before which it ends, in pixels.
    """
    places = torch.arange(size, device=first.device)
    within = (places >= first.unsqueeze(2)) & (places < end.unsqueeze(2))  # (B, 2, S)
    return within[:, 0, None, :, None] & within[:, 1, None, None, :]


OPERATIONS = [
    Operation("horizontal_flip", ("hflip_probability",), draw_flip, flip),
    Operation("rotation", ("rotation_degrees",), draw_rotation, rotate),
    Operation("color_jitter", tuple(ADJUSTMENTS), draw_color_jitter, adjust_colors),
    Operation("random_erasing", ("random_erasing_probability",), draw_erasing, erase),
    Operation("mixing", ("mixup_alpha", "cutmix_alpha"), draw_mixing, mix),
]
"""In the order of application."""
