"""The recipe of a run: one frozen, complete, validated value."""

import dataclasses
import hashlib
import json
import math
from dataclasses import field
from typing import Any, Literal, get_args, get_origin

from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.validation import above, at_least, at_least_and_below, between, out_of_range

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Interpolation = Literal["bilinear", "bicubic"]
TrainInterpolation = Literal["bilinear", "bicubic", "random"]
BatchRule = Literal["none", "linear", "sqrt"]
PublishedWeights = Literal["model", "ema"]
Sampling = Literal["uniform", "balanced"]


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
    stochastic_depth: float = field(default=0.0, metadata=at_least_and_below(0, 1))
    """Probability that an image skips the last residual branch; the first is never skipped, between them it grows
    linearly (https://arxiv.org/abs/1603.09382)."""
    sync_batch_norm: bool = False
    """With several processes, norm statistics of the global batch, or of its part in an accumulation step."""

    epochs: int = field(metadata=at_least(1))
    """Passes over the training images."""
    global_batch_size: int = field(metadata=at_least(1))
    """Images per optimizer step, over all processes together."""
    loss: str = "cross_entropy"
    """Training loss, by its name in resnet_in1k/optim/losses.py."""
    label_smoothing: float = field(default=0.0, metadata=between(0, 1))
    """Share of the target spread evenly over all classes (https://arxiv.org/abs/1512.00567)."""
    bce_target_threshold: float = field(default=0.0, metadata=at_least_and_below(0, 1))
    """Binary cross entropy takes targets above this as 1, others as 0; 0: takes them as they are."""
    optimizer: str = "sgd"
    """Optimizer, by its name in resnet_in1k/optim/optimizers.py."""
    lr: float = field(metadata=above(0))
    """Peak learning rate, for the global batch as it is."""
    lr_batch_rule: BatchRule = "none"
    """How the command line changes lr where only the batch is changed: in proportion to it, to its root, or not."""
    lr_schedule: str = "step"
    """`step`: times lr_step_factor every lr_step_epochs; `multi_step`: at lr_milestones; `cosine`, `linear`,
    `polynomial`: to lr_floor; or another of resnet_in1k/optim/lr.py."""
    lr_step_epochs: int = field(default=30, metadata=at_least(1))
    """Epochs between two drops of the `step` schedule."""
    lr_milestones: tuple[float, ...] = field(default=(), metadata=above(0))
    """Epochs done, or fractions of them, after which the `multi_step` schedule drops."""
    lr_step_factor: float = field(default=0.1, metadata=above(0))
    """What the learning rate is multiplied by at each drop of `step` or `multi_step`."""
    lr_floor: float = field(default=0.0, metadata=at_least(0))
    """Learning rate that `cosine`, `linear` and `polynomial` reach just after the last step."""
    lr_power: float = field(default=2.0, metadata=above(0))
    """Exponent of the `polynomial` schedule."""
    warmup_epochs: float = field(default=0.0, metadata=at_least(0))
    """Epochs of linear warm-up to the peak learning rate, counted within `epochs`; 0 for none."""
    warmup_start_factor: float = field(default=0.0, metadata=between(0, 1))
    """Where warm-up starts, as a share of lr."""
    momentum: float = field(default=0.0, metadata=at_least_and_below(0, 1))
    """Momentum of SGD, LARS and Muon; LAMB and AdamW use their own."""
    nesterov: bool = False
    """Nesterov's momentum, of the same optimizers."""
    weight_decay: float = field(default=0.0, metadata=at_least(0))
    """Coefficient of weight decay, as the optimizer applies it: SGD adds it to the gradient, `sgdw` and `adamw` shrink
    the weights by it."""
    decay_norms: bool = True
    """Weight decay also on the weights and biases of normalization layers."""
    decay_biases: bool = True
    """Weight decay also on the biases of other layers."""
    head_lr_factor: float = field(default=1.0, metadata=above(0))
    """The learning rate of the last layer is the others' times this."""
    freeze_epochs: int = field(default=0, metadata=at_least(0))
    """In the first so many epochs the last layer is trained alone; the norms then use their statistics."""
    max_grad_norm: float = field(default=0.0, metadata=at_least(0))
    """Gradients are scaled down to this global norm; 0: not."""

    ema_decay: float = field(default=0.0, metadata=at_least_and_below(0, 1))
    """Decay of an exponential moving average of weights and buffers, adjusted to the run's length, see model/ema.py;
    0: none."""
    ema_every_steps: int = field(default=1, metadata=at_least(1))
    """Optimizer steps between two updates of the average."""
    publish: PublishedWeights = "model"
    """Which weights are the run's result: the model's or their moving average. Both are evaluated."""

    image_size: int = field(metadata=at_least(1))
    """Side of the square that the network sees, in pixels; of training's last epochs, where it changes."""
    initial_image_size: int = field(default=0, metadata=at_least(0))
    """Side of the training square in the first epochs, in pixels; 0: image_size in all epochs."""
    image_size_ramp_start: int = field(default=1, metadata=at_least(1))
    """Last epoch at initial_image_size; then the size grows linearly, to the nearest multiple of 32 px."""
    image_size_ramp_end: int = field(default=1, metadata=at_least(1))
    """First epoch at image_size."""
    crop_scale_min: float = field(default=0.08, metadata=above(0, at_most=1))
    """Least share of the image's area that a training crop covers; the largest is 1."""
    train_interpolation: TrainInterpolation = "bilinear"
    """Of training's resizing, antialiased; `random`: either, for each image."""
    sampling: Sampling = "uniform"
    """`uniform`: each image once an epoch; `balanced`: as many draws, of each class equally many on average."""
    shuffle_window: int = field(default=0, metadata=at_least(0))
    """With shards: they are shuffled, then the images within so many of them at a time, for disks that are slow at
    random reads; 0: all images at once."""
    repeated_augmentation: int = field(default=1, metadata=at_least(1))
    """How often an image is in its global batch, each time with other crops; an epoch keeps its length and has as many
    times fewer different images (https://arxiv.org/abs/1901.09335)."""
    augment_policy: str = "none"
    """`trivial_augment`, `rand_augment`, `timm_rand_augment` or `auto_augment`: see resnet_in1k/data/policies.py."""
    rand_augment_num_ops: int = field(default=2, metadata=at_least(1))
    """Operations in a row of either RandAugment."""
    rand_augment_magnitude: float = field(default=9.0, metadata=between(0, 30))
    """Strength of either RandAugment: up to 30 of torchvision's, up to 10 of timm's."""
    rand_augment_magnitude_std: float = field(default=0.0, metadata=at_least(0))
    """Standard deviation of the strength of timm's RandAugment."""
    hflip_probability: float = field(default=0.0, metadata=between(0, 1))
    """Probability that a training image is mirrored."""
    alternating_flip: bool = False
    """Mirror each image in every other epoch, in place of hflip_probability (https://arxiv.org/abs/2404.00498)."""
    rotation_degrees: float = field(default=0.0, metadata=between(0, 180))
    """Training images are rotated by up to this many degrees either way."""
    brightness: float = field(default=0.0, metadata=between(0, 1))
    """Brightness is multiplied by a factor from [1 - this, 1 + this]; so for contrast and saturation."""
    contrast: float = field(default=0.0, metadata=between(0, 1))
    """Width of the contrast factor's range, as for brightness."""
    saturation: float = field(default=0.0, metadata=between(0, 1))
    """Width of the saturation factor's range, as for brightness."""
    hue: float = field(default=0.0, metadata=between(0, 0.5))
    """Hue is shifted by up to this share of the color circle either way, at most 0.5."""
    random_erasing_probability: float = field(default=0.0, metadata=between(0, 1))
    """Probability that a rectangle of a training image is replaced by the mean color
    (https://arxiv.org/abs/1708.04896)."""
    mixup_alpha: float = field(default=0.0, metadata=at_least(0))
    """Of the Beta distribution of mixup's weights (https://arxiv.org/abs/1710.09412); 0: no mixup."""
    cutmix_alpha: float = field(default=0.0, metadata=at_least(0))
    """The same of cutmix (https://arxiv.org/abs/1905.04899). With both, each is chosen with probability 1/2."""
    mix_by_pair: bool = False
    """Choose mixup or cutmix and its weight for each pair of images, not for each batch."""

    eval_image_size: int = field(default=0, metadata=at_least(0))
    """Side of the center crop of evaluation, in pixels; 0: image_size."""
    eval_crop_ratio: float = field(default=0.875, metadata=above(0, at_most=1))
    """Evaluation resizes the short side to its image size over this, in pixels, then crops the center."""
    eval_interpolation: Interpolation = "bilinear"
    """Of evaluation's resizing, antialiased."""

    seed: int = field(default=0, metadata=at_least(0))
    """Seed of all that is random: initial weights, order, crops, augmentation."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if each.type is float:  # 1 and 1.0 are the same recipe, and must have the same fingerprint
                object.__setattr__(self, each.name, float(getattr(self, each.name)))
            elif each.type == tuple[float, ...]:  # a list, where it comes from JSON
                object.__setattr__(self, each.name, tuple(float(value) for value in getattr(self, each.name)))
        problems = [f"{name} must be {words}, not {value!r}" for name, words, value in out_of_range(self)]
        for each in dataclasses.fields(self):
            if get_origin(each.type) is Literal and getattr(self, each.name) not in get_args(each.type):
                choices = ", ".join(get_args(each.type))
                problems.append(f"{each.name} must be one of {choices}, not {getattr(self, each.name)!r}")
        problems += [words for words, is_wrong in self._contradictions() if is_wrong]
        if problems:
            raise UserError("invalid recipe: " + "; ".join(problems))

    def _contradictions(self) -> list[tuple[str, bool]]:
        """What must hold between fields, in words, and whether it does not."""
        ramp_start, ramp_end = self.image_size_ramp_start, self.image_size_ramp_end
        milestones = list(self.lr_milestones)
        return [
            (
                f"warmup_epochs ({self.warmup_epochs}) must not exceed epochs ({self.epochs})",
                self.warmup_epochs > self.epochs,
            ),
            (
                f"initial_image_size ({self.initial_image_size}) must not exceed image_size ({self.image_size})",
                self.initial_image_size > self.image_size,
            ),
            (
                f"image_size_ramp_end ({ramp_end}) must be after image_size_ramp_start ({ramp_start})",
                self.initial_image_size > 0 and ramp_end <= ramp_start,
            ),
            (f"lr_milestones {milestones} must increase", milestones != sorted(set(milestones))),
            ("lr_schedule multi_step needs lr_milestones", self.lr_schedule == "multi_step" and not milestones),
            (f"lr_floor ({self.lr_floor}) must not exceed lr ({self.lr})", self.lr_floor > self.lr),
            ("nesterov needs a momentum", self.nesterov and not self.momentum),
            (
                "alternating_flip takes the place of hflip_probability, which must be 0 then",
                self.alternating_flip and self.hflip_probability > 0,
            ),
            (
                f"global_batch_size ({self.global_batch_size}) must be even, as neighbors are mixed",
                self.mixes and self.global_batch_size % 2 == 1,
            ),
            (
                f"rand_augment_magnitude ({self.rand_augment_magnitude:g}) must be whole, and of timm's at most 10",
                self.rand_augment_magnitude % 1 > 0
                or (self.augment_policy == "timm_rand_augment" and self.rand_augment_magnitude > 10),
            ),
            (
                "shuffle_window needs sampling uniform, as balanced draws are from all images",
                self.shuffle_window > 0 and self.sampling != "uniform",
            ),
            ("publish ema needs an ema_decay", self.publish == "ema" and not self.ema_decay),
        ]

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that targets are probabilities."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def eval_size(self) -> int:
        """Side of the center crop of evaluation, in pixels."""
        return self.eval_image_size or self.image_size

    @property
    def eval_resize_size(self) -> int:
        """Short side before the center crop of evaluation, in pixels."""
        return resize_size_for(self.eval_size, self.eval_crop_ratio)

    def non_default_fields(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and those that have none."""
        return {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if getattr(self, each.name) != each.default
        }

    def fingerprint(self, initial_weights_sha256: str = "") -> str:
        """sha256 of all that decides what a step computes: what is switched on, and the weights that it starts from if
        they are not random; without `epochs` where no step depends on it."""
        deciding = self.non_default_fields()
        if initial_weights_sha256:
            deciding["init_from"] = initial_weights_sha256
        deciding.pop("lr_batch_rule", None)
        if self.allows_more_epochs:
            del deciding["epochs"]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    @property
    def allows_more_epochs(self) -> bool:
        """Whether a run of it may be resumed with more epochs: no step depends on how many there will be."""
        return self.lr_schedule in ("step", "multi_step") and not self.ema_decay

    def incompatibilities(self, other: "Recipe") -> list[str]:
        """Why a run of this recipe cannot be resumed by `other`: any difference but more epochs where it can grow."""
        if other.fingerprint() == self.fingerprint() and other.epochs >= self.epochs:
            return []
        return self.differences(other)

    def differences(self, other: "Recipe") -> list[str]:
        """What `other` changes, one `field old → new` each."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{name} {mine.get(name)} → {theirs[name]}" for name in theirs if mine.get(name) != theirs[name]]


def resize_size_for(image_size: int, eval_crop_ratio: float) -> int:
    """Short side, in pixels, of which a center crop of `image_size` is the share `eval_crop_ratio`, rounded down."""
    return math.floor(image_size / eval_crop_ratio)


def crop_ratio_for(image_size: int, resize_size: int, preferred: float) -> float:
    """A ratio for which `resize_size_for` gives `resize_size`: the preferred one, if it does."""
    ratio = preferred
    if resize_size_for(image_size, ratio) != resize_size:
        ratio = image_size / resize_size
    while resize_size_for(image_size, ratio) < resize_size:  # the division was rounded up
        ratio = math.nextafter(ratio, 0)
    return ratio
