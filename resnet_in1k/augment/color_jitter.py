"""Brightness, contrast, saturation and hue, in an order that is drawn for each batch.

Each adjustment gives what torchvision's functional of the same name gives, except that torchvision rounds to integer
gray levels after each one. Here the values stay float.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_in1k.augment.flip_rotate_erase import uniform
from resnet_in1k.recipes.recipe import Recipe


@dataclass(frozen=True)
class ColorJitter:
    """Color jitter with torchvision's meaning of the four widths; 0 disables an adjustment.

    Each image has its own factors. The images of a batch share the order of the adjustments, so that each adjustment is
    one operation over the batch.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    name: str = "color_jitter"
    works_on_uint8: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, num_classes: int) -> "ColorJitter | None":
        widths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        return cls(*widths) if any(widths) else None

    def draw(self, generator: torch.Generator, batch_size: int) -> tuple[Tensor, list[str]]:
        """(B, 4) factors, the hue's in turns of the color wheel; and the order, as names of ADJUSTMENTS."""
        factors = [
            uniform(generator, batch_size, 1 - width, 1 + width)
            for width in (self.brightness, self.contrast, self.saturation)
        ]
        factors.append(uniform(generator, batch_size, -self.hue, self.hue))
        names = list(ADJUSTMENTS)
        order = [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]
        return torch.stack(factors, dim=1), order

    def apply(self, images: Tensor, targets: Tensor, draws: Tensor, shared: list[str]) -> tuple[Tensor, Tensor]:
        images = images.contiguous()  # the adjustments work channel by channel
        factors = dict(zip(ADJUSTMENTS, draws.unbind(dim=1), strict=True))
        for name in shared:
            if getattr(self, name):
                images = ADJUSTMENTS[name](images, factors[name])
        return images, targets


def grayscale(images: Tensor) -> Tensor:
    """Luma by ITU-R 601-2 in integer gray levels as torchvision takes it, (B, 3, H, W) to (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    weight = factor.view(-1, 1, 1, 1)
    return images.mul_(weight).add_((1 - weight) * other).clamp_(0, 255)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's own mean gray level."""
    return _blend(images, grayscale(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image in gray."""
    return _blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by `turns` of the color wheel, (B,), and keep saturation and value.

    From red over yellow and green a hue runs along the edges of a hexagon, so a channel of a saturated color is a
    trapezoid over the hue. Chroma scales it and the least channel lifts it (https://en.wikipedia.org/wiki/HSL_and_HSV).
    """
    value, low = images.amax(dim=1), images.amin(dim=1)  # (B, H, W)
    chroma = value - low
    red, green, blue = images.unbind(dim=1)
    divisor = chroma.clamp(min=1e-30)  # a gray pixel has no hue; any will do, because its chroma is 0
    sixths = torch.where(
        red == value,
        (green - blue).div_(divisor),
        torch.where(green == value, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4)),
    )
    sixths = sixths.add_(6 * turns.view(-1, 1, 1))
    # A channel's height follows from the distance of the hue to that of its complement (for red: cyan, at 3).
    # Up to a distance of 1 the height is 0, from 2 on it is 1.
    images.copy_(sixths.unsqueeze(1))
    images[:, 1].add_(4)
    images[:, 2].add_(2)
    heights = images.remainder_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return heights.mul_(chroma.unsqueeze(1)).add_(low.unsqueeze(1))


ADJUSTMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}
"""Functions that change the images in place and return them, by name."""
