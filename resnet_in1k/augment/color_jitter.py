"""Brightness, contrast, saturation and hue, in an order of its own for each image.

Each adjustment gives what torchvision's functional of the same name gives, except for the rounding to whole gray levels
that torchvision does after each; here the values stay float.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from resnet_in1k.augment.operation import Arranged, Draws, uniform
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

    def arrange(self, draws: Draws) -> Arranged:
        """For each turn, which images come next to which, so that those of the same adjustment are neighbors.

        `rows` (4, B) int64: at each turn, the positions of the images, as the turn before has left them, in their new
        order; `factors` (4, B): of each image in that order; `sizes`: for each turn, how many images have each of
        ADJUSTMENTS; `back` (B,) int64: to the order of the batch.
        """
        order = draws["order"]
        rows = order.argsort(dim=0, stable=True).T  # (4, B), positions in the batch
        places = rows.argsort(dim=1)  # (4, B): where each image of the batch is, at each turn
        factors = torch.stack([draws[name] for name in ADJUSTMENTS], dim=1).gather(1, order).T
        return {
            "rows": torch.cat([rows[:1], places[:-1].gather(1, rows[1:])]),
            "factors": factors.gather(1, rows),
            "sizes": one_hot(order, len(ADJUSTMENTS)).sum(dim=0).tolist(),
            "back": places[-1],
        }

    def apply(self, images: Tensor, targets: Tensor, draws: Arranged) -> tuple[Tensor, Tensor]:
        if "sizes" in draws:
            return self._adjust_groups(images, draws), targets
        return self._choose_from_all(images, draws), targets

    def _adjust_groups(self, images: Tensor, draws: Arranged) -> Tensor:
        """Each image goes through its own adjustment only, together with all that have the same at this turn."""
        images = images.contiguous()  # the adjustments work channel by channel
        for rows, factors, sizes in zip(draws["rows"], draws["factors"], draws["sizes"], strict=True):
            images = images[rows]
            groups = zip(ADJUSTMENTS.items(), images.split(sizes), factors.split(sizes), strict=True)
            for (name, adjust), group, factor in groups:
                if getattr(self, name) and len(group):
                    adjust(group, factor)
        return images[draws["back"]]

    def _choose_from_all(self, images: Tensor, draws: Arranged) -> Tensor:
        """The same with shapes that do not depend on the draws: what a compiler makes one kernel of at each turn."""
        for order in draws["order"].unbind(dim=1):
            before = images
            for number, (name, adjust) in enumerate(ADJUSTMENTS.items()):
                if getattr(self, name):
                    chosen = (order == number).view(-1, 1, 1, 1)
                    images = torch.where(chosen, adjust(before.clone(), draws[name]), images)
        return images


def from_recipe(recipe: Recipe, num_classes: int) -> ColorJitter | None:
    widths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return ColorJitter(*widths) if any(widths) else None


def gray(images: Tensor) -> Tensor:
    """Luma by ITU-R 601-2 in whole gray levels as torchvision takes it, (B, 3, H, W) to (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    weight = factor.view(-1, 1, 1, 1)
    return images.mul_(weight).add_((1 - weight) * other).clamp_(0, 255)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Towards or away from the image's own mean gray."""
    return _blend(images, gray(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, gray(images), factor)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by `turns` of the color circle, (B,), keeping saturation and value.

    Between red, yellow, green … a hue runs along one edge of a hexagon, so a channel of a fully saturated color is a
    trapezoid of the hue; chroma scales it and the least channel lifts it (https://en.wikipedia.org/wiki/HSL_and_HSV).
    """
    value, low = images.amax(dim=1), images.amin(dim=1)  # (B, H, W)
    chroma = value - low
    red, green, blue = images.unbind(dim=1)
    divisor = chroma.clamp(min=1e-30)  # a gray pixel has no hue; any will do, its chroma is 0
    sixths = torch.where(
        red == value,
        (green - blue).div_(divisor),
        torch.where(green == value, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4)),
    )
    sixths = sixths.add_(6 * turns.view(-1, 1, 1))
    # A channel's height follows from how far the hue is from that of its complement, for red from cyan at 3: up to 1
    # it is 0, from 2 on it is 1.
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
"""Each changes the images in place, and returns them."""
