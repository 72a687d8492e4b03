"""The science of a run: one frozen, complete, validated value, and the named ones."""

import dataclasses
import hashlib
import json
import math
from typing import Literal

from resnet_in1k.errors import UserError

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes; nothing about the machine it runs on.

    Raises:
        UserError: naming every field that is out of range, all at once.
    """

    model: Architecture
    """Architecture, by torchvision's name."""
    zero_init_residual: bool
    """Start every residual branch at zero by its last norm's weight (https://arxiv.org/abs/1706.02677, section 5.1)."""

    epochs: int
    """Passes over the training images."""
    global_batch_size: int
    """Images per optimizer step, over all processes together."""
    lr: float
    """Peak learning rate, for the global batch as it is: nothing scales it."""
    lr_schedule: Literal["step", "cosine"]
    """`step`: times lr_step_factor every lr_step_epochs; `cosine`: per step to zero (https://arxiv.org/abs/1608.03983)."""
    lr_step_epochs: int
    """Epochs between two drops of the `step` schedule."""
    lr_step_factor: float
    """What the learning rate is multiplied by at each drop of the `step` schedule."""
    warmup_epochs: float
    """Epochs of linear warm-up to the peak learning rate, counted within `epochs`; 0 for none."""
    momentum: float
    """Momentum of SGD."""
    weight_decay: float
    """L2 penalty's coefficient, on all parameters, as torch.optim.SGD applies it."""
    label_smoothing: float
    """Share of the target spread evenly over all classes (https://arxiv.org/abs/1512.00567)."""

    image_size: int
    """Side of the square that the network sees, in training and evaluation, in pixels."""
    eval_crop_ratio: float
    """Evaluation resizes the short side to image_size / eval_crop_ratio pixels, then crops the centre."""
    crop_scale_min: float
    """Least share of the image's area that a training crop covers; the largest is 1."""
    hflip_probability: float
    """Probability that a training image is mirrored."""
    rotation_degrees: float
    """Training images are rotated by up to this many degrees either way."""
    brightness: float
    """Brightness is multiplied by a factor from [1 - this, 1 + this]; so for contrast and saturation."""
    contrast: float
    """Width of the contrast factor's range, as for brightness."""
    saturation: float
    """Width of the saturation factor's range, as for brightness."""
    hue: float
    """Hue is shifted by up to this share of the colour circle either way, at most 0.5."""

    seed: int
    """Seed of all that is random: initial weights, order, crops, augmentation."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is float:  # 1 and 1.0 are the same recipe, and must have the same fingerprint
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        problems = [
            f"{name} must be {rule}, not {getattr(self, name)!r}"
            for name, rule, holds in self._rules()
            if not (math.isfinite(getattr(self, name)) and holds)
        ]
        if self.warmup_epochs > self.epochs:
            problems.append(f"warmup_epochs ({self.warmup_epochs}) must not exceed epochs ({self.epochs})")
        if problems:
            raise UserError("invalid recipe: " + "; ".join(problems))

    def _rules(self) -> list[tuple[str, str, bool]]:
        """(field, rule in words, whether it holds)."""
        at_least_one = ["epochs", "global_batch_size", "lr_step_epochs", "image_size"]
        not_negative = ["warmup_epochs", "weight_decay", "seed"]
        unit_interval = ["label_smoothing", "hflip_probability", "brightness", "contrast", "saturation"]
        return [
            *((name, "at least 1", getattr(self, name) >= 1) for name in at_least_one),
            *((name, "at least 0", getattr(self, name) >= 0) for name in not_negative),
            *((name, "between 0 and 1", 0 <= getattr(self, name) <= 1) for name in unit_interval),
            *((name, "above 0", getattr(self, name) > 0) for name in ["lr", "lr_step_factor"]),
            *(
                (name, "above 0, at most 1", 0 < getattr(self, name) <= 1)
                for name in ["eval_crop_ratio", "crop_scale_min"]
            ),
            ("momentum", "at least 0 and below 1", 0 <= self.momentum < 1),
            ("rotation_degrees", "between 0 and 180", 0 <= self.rotation_degrees <= 180),
            ("hue", "between 0 and 0.5", 0 <= self.hue <= 0.5),
        ]

    @property
    def eval_resize_size(self) -> int:
        """Short side before the centre crop of evaluation, in pixels."""
        return resize_size_for(self.image_size, self.eval_crop_ratio)

    def fingerprint(self) -> str:
        """sha256 of all that decides what a step computes; under the `step` schedule `epochs` is no part of that."""
        deciding = dataclasses.asdict(self)
        if self.lr_schedule == "step":
            del deciding["epochs"]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def objections_to(self, other: "Recipe") -> list[str]:
        """What forbids going on by `other` with a run begun by this recipe: anything but more epochs under `step`."""
        if other.fingerprint() == self.fingerprint() and other.epochs >= self.epochs:
            return []
        return self.differences(other)

    def differences(self, other: "Recipe") -> list[str]:
        """What `other` changes, one `field old → new` each."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{name} {mine[name]} → {theirs[name]}" for name in mine if mine[name] != theirs[name]]


def resize_size_for(image_size: int, eval_crop_ratio: float) -> int:
    """Short side, in pixels, of which a centre crop of `image_size` is the share `eval_crop_ratio`, rounded down."""
    return math.floor(image_size / eval_crop_ratio)


def crop_ratio_for(image_size: int, resize_size: int, preferred: float) -> float:
    """A ratio of which `resize_size_for` makes `resize_size` again: the preferred one, if it does."""
    ratio = preferred
    if resize_size_for(image_size, ratio) != resize_size:
        ratio = image_size / resize_size
    while resize_size_for(image_size, ratio) < resize_size:  # the division has been rounded up
        ratio = math.nextafter(ratio, 0)
    return ratio


TUTORIAL = Recipe(
    model="resnet50",
    zero_init_residual=False,
    epochs=20,
    global_batch_size=256,
    lr=0.1,
    lr_schedule="step",
    lr_step_epochs=5,
    lr_step_factor=0.2,
    warmup_epochs=0,
    momentum=0.9,
    weight_decay=1e-4,
    label_smoothing=0.0,
    image_size=224,
    eval_crop_ratio=0.875,
    crop_scale_min=0.08,
    hflip_probability=0.5,
    rotation_degrees=10,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.2,
    seed=0,
)
"""The two-GPU ImageNet tutorial this project grew from: 2×A100, 13 hours; top-1 not published, not measured here."""

DEMO = dataclasses.replace(
    TUTORIAL,
    zero_init_residual=True,
    epochs=10,
    global_batch_size=32,
    lr=0.02,
    lr_schedule="cosine",
    warmup_epochs=1,
    label_smoothing=0.1,
    image_size=32,
    eval_crop_ratio=1.0,
    crop_scale_min=0.75,
    hflip_probability=0.0,
    hue=0.0,
)
"""A ResNet-50 that reads handwritten digits after a minute and a half on two CPU cores, by the same path as ImageNet.

Mirroring and hue are off: a mirrored digit is another sign, and a grey one has no hue. Measured here, see README.
"""

RECIPES: dict[str, Recipe] = {"tutorial": TUTORIAL, "demo": DEMO}

DEFAULT_DATA: dict[str, str] = {"tutorial": "data/imagenet", "demo": "digits"}
"""What each recipe is meant for, and trains on if `--data` is not given."""
