"""The recipe of a run: one frozen, complete, validated value."""

import dataclasses
import hashlib
import json
import math
from dataclasses import field
from typing import Any, Literal

from resnet_in1k.core.errors import UserError
from resnet_in1k.core.ranges import above, at_least, at_least_and_below, between, out_of_range

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes; nothing about the machine it runs on.

    A field added later has a default that switches it off: recipes written before it then still load, and keep their
    fingerprint.

    Raises:
        UserError: naming every field that is out of its range, all at once.
    """

    model: Architecture
    """Architecture, by torchvision's name."""
    zero_init_residual: bool = False
    """Start every residual branch at zero by its last norm's weight (https://arxiv.org/abs/1706.02677, section 5.1)."""

    epochs: int = field(metadata=at_least(1))
    """Passes over the training images."""
    global_batch_size: int = field(metadata=at_least(1))
    """Images per optimizer step, over all processes together."""
    loss: str = "cross_entropy"
    """Training loss, by its name in resnet_in1k/optim/losses.py."""
    label_smoothing: float = field(default=0.0, metadata=between(0, 1))
    """Share of the target spread evenly over all classes (https://arxiv.org/abs/1512.00567)."""
    optimizer: str = "sgd"
    """Optimizer, by its name in resnet_in1k/optim/optimizers.py."""
    lr: float = field(metadata=above(0))
    """Peak learning rate, for the global batch as it is: nothing scales it."""
    lr_schedule: str = "step"
    """`step`: times lr_step_factor every lr_step_epochs; `cosine`: to zero; or another of resnet_in1k/optim/lr.py."""
    lr_step_epochs: int = field(default=30, metadata=at_least(1))
    """Epochs between two drops of the `step` schedule."""
    lr_step_factor: float = field(default=0.1, metadata=above(0))
    """What the learning rate is multiplied by at each drop of the `step` schedule."""
    warmup_epochs: float = field(default=0.0, metadata=at_least(0))
    """Epochs of linear warm-up to the peak learning rate, counted within `epochs`; 0 for none."""
    momentum: float = field(default=0.0, metadata=at_least_and_below(0, 1))
    """Momentum of SGD."""
    weight_decay: float = field(default=0.0, metadata=at_least(0))
    """L2 penalty's coefficient, on all parameters, as torch.optim.SGD applies it."""

    image_size: int = field(metadata=at_least(1))
    """Side of the square that the network sees, in pixels; of training's last epochs, where it changes."""
    initial_image_size: int = field(default=0, metadata=at_least(0))
    """Side of the training square in the first epochs, in pixels; 0: image_size in all epochs."""
    image_size_ramp_start: int = field(default=1, metadata=at_least(1))
    """Last epoch at initial_image_size; then the size grows linearly, in multiples of 32 px."""
    image_size_ramp_end: int = field(default=1, metadata=at_least(1))
    """First epoch at image_size."""
    crop_scale_min: float = field(default=0.08, metadata=above(0, at_most=1))
    """Least share of the image's area that a training crop covers; the largest is 1."""
    hflip_probability: float = field(default=0.0, metadata=between(0, 1))
    """Probability that a training image is mirrored."""
    rotation_degrees: float = field(default=0.0, metadata=between(0, 180))
    """Training images are rotated by up to this many degrees either way."""
    brightness: float = field(default=0.0, metadata=between(0, 1))
    """Brightness is multiplied by a factor from [1 - this, 1 + this]; so for contrast and saturation."""
    contrast: float = field(default=0.0, metadata=between(0, 1))
    """Width of the contrast factor's range, as for brightness."""
    saturation: float = field(default=0.0, metadata=between(0, 1))
    """Width of the saturation factor's range, as for brightness."""
    hue: float = field(default=0.0, metadata=between(0, 0.5))
    """Hue is shifted by up to this share of the colour circle either way, at most 0.5."""

    eval_image_size: int = field(default=0, metadata=at_least(0))
    """Side of the centre crop of evaluation, in pixels; 0: image_size."""
    eval_crop_ratio: float = field(default=0.875, metadata=above(0, at_most=1))
    """Evaluation resizes the short side to its image size over this, in pixels, then crops the centre."""
    eval_interpolation: Interpolation = "bilinear"
    """Of evaluation's resizing, antialiased."""

    seed: int = field(default=0, metadata=at_least(0))
    """Seed of all that is random: initial weights, order, crops, augmentation."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if each.type is float:  # 1 and 1.0 are the same recipe, and must have the same fingerprint
                object.__setattr__(self, each.name, float(getattr(self, each.name)))
        problems = [f"{name} must be {words}, not {value!r}" for name, words, value in out_of_range(self)]
        if self.warmup_epochs > self.epochs:
            problems.append(f"warmup_epochs ({self.warmup_epochs}) must not exceed epochs ({self.epochs})")
        if self.initial_image_size > self.image_size:
            problems.append(
                f"initial_image_size ({self.initial_image_size}) must not exceed image_size ({self.image_size})"
            )
        if self.initial_image_size and self.image_size_ramp_end <= self.image_size_ramp_start:
            problems.append(
                f"image_size_ramp_end ({self.image_size_ramp_end}) must be after image_size_ramp_start "
                f"({self.image_size_ramp_start})"
            )
        if problems:
            raise UserError("invalid recipe: " + "; ".join(problems))

    @property
    def eval_size(self) -> int:
        """Side of the centre crop of evaluation, in pixels."""
        return self.eval_image_size or self.image_size

    @property
    def eval_resize_size(self) -> int:
        """Short side before the centre crop of evaluation, in pixels."""
        return resize_size_for(self.eval_size, self.eval_crop_ratio)

    def switched_on(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and those that have none."""
        return {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if getattr(self, each.name) != each.default
        }

    def fingerprint(self) -> str:
        """sha256 of all that decides what a step computes: what is switched on; without `epochs` if `lr_schedule` is
        `step`, as no step depends on it then."""
        deciding = self.switched_on()
        if self.lr_schedule == "step":
            del deciding["epochs"]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def incompatibilities(self, other: "Recipe") -> list[str]:
        """Why a run of this recipe cannot be resumed by `other`: any difference but more epochs under `step`."""
        if other.fingerprint() == self.fingerprint() and other.epochs >= self.epochs:
            return []
        return self.differences(other)

    def differences(self, other: "Recipe") -> list[str]:
        """What `other` changes, one `field old → new` each."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{name} {mine.get(name)} → {theirs[name]}" for name in theirs if mine.get(name) != theirs[name]]


def resize_size_for(image_size: int, eval_crop_ratio: float) -> int:
    """Short side, in pixels, of which a centre crop of `image_size` is the share `eval_crop_ratio`, rounded down."""
    return math.floor(image_size / eval_crop_ratio)


def crop_ratio_for(image_size: int, resize_size: int, preferred: float) -> float:
    """A ratio for which `resize_size_for` gives `resize_size`: the preferred one, if it does."""
    ratio = preferred
    if resize_size_for(image_size, ratio) != resize_size:
        ratio = image_size / resize_size
    while resize_size_for(image_size, ratio) < resize_size:  # the division was rounded up
        ratio = math.nextafter(ratio, 0)
    return ratio
