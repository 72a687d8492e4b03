"""Brightness, contrast, saturation and hue, in an order of its own for each image.

Each adjustment gives what torchvision's functional of the same name gives, except for the rounding to whole grey levels
that torchvision does after each; here the values stay float.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_in1k.augment.operation import Draws, to_device, uniform
from resnet_in1k.recipes.recipe import Recipe


@dataclass(frozen=True)
class ColorJitter:
    """As torchvision's; 0 switches an adjustment off."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    name: str = "color_jitter"

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        """Multipliers, for hue shifts in turns, by adjustment, (B,); `order` (B, 4) int64, indices into ADJUSTMENTS."""
        draws = {}
        for name in ("brightness", "contrast", "saturation"):
            width = getattr(self, name)
            draws[name] = uniform(generator, batch_size, 1 - width, 1 + width)
        draws["hue"] = uniform(generator, batch_size, -self.hue, self.hue)
        draws["order"] = torch.rand(batch_size, len(ADJUSTMENTS), generator=generator).argsort(dim=1)
        return draws

    def apply(self, images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """In place. At each of four turns, gather the images that have the same adjustment next, and do it for all."""
        for turn in range(len(ADJUSTMENTS)):
            for number, (name, adjust) in enumerate(ADJUSTMENTS.items()):
                rows = (draws["order"][:, turn] == number).nonzero().flatten()
                if getattr(self, name) and len(rows):
                    factor, rows = to_device(draws[name][rows], images), to_device(rows, images)
                    images.index_copy_(0, rows, adjust(images[rows], factor))
        return images, targets


def from_recipe(recipe: Recipe, num_classes: int) -> ColorJitter | None:
    widths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return ColorJitter(*widths) if any(widths) else None


def grey(images: Tensor) -> Tensor:
    """Luma by ITU-R 601-2 in whole grey levels as torchvision takes it, (B, 3, H, W) to (B, 1, H, W)."""
    red, green, blue = images.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor().unsqueeze(1)


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    weight = factor.view(-1, 1, 1, 1)
    return (weight * images + (1 - weight) * other).clamp(0, 255)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, 0.0, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Towards or away from the image's own mean grey."""
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, grey(images), factor)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by `turns` of the colour circle, (B,), keeping saturation and value.

    Between red, yellow, green … a hue runs along one edge of a hexagon, so a channel of a fully saturated colour is a
    trapezoid of the hue; chroma scales it and value lifts it (https://en.wikipedia.org/wiki/HSL_and_HSV).
    """
    value = images.amax(dim=1)  # (B, H, W)
    chroma = value - images.amin(dim=1)
    red, green, blue = images.unbind(dim=1)
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


ADJUSTMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}
