"""The recipe of a run: one frozen, complete, validated value."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import field
from typing import Any, ClassVar, Literal

from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.validation import invalid_fields, within

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Interpolation = Literal["bilinear", "bicubic"]
PublishedWeights = Literal["model", "ema"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes; nothing about its machine.

    A new field must have a default that disables it, so that older recipes load and keep their fingerprint.

    Raises:
        UserError: with all fields that are out of range.
    """

    GROUPS: ClassVar = {
        "model": "Model",
        "epochs": "Schedule",
        "seed": "Run",
        "optimizer": "Optimizer",
        "head_lr_factor": "Fine-tuning",
        "max_grad_norm": "Optimizer",
        "ema_decay": "Moving average",
        "loss": "Loss",
        "image_size": "Image size",
        "crop_scale_min": "Augmentation",
        "sampling": "Data",
        "repeated_augmentation": "Augmentation",
    }
    BASIC: ClassVar = ("model", "epochs", "global_batch_size", "lr", "seed", "image_size", "augment_policy", "sampling")
    DEFAULTS_VARY: ClassVar = True

    model: Architecture
    """Architecture, by torchvision's name."""
    zero_init_residual: bool = False
    """Initialize the last norm of every residual branch to zero (https://arxiv.org/abs/1706.02677, section 5.1)."""
    stochastic_depth: float = field(default=0.0, metadata=within(at_least=0, below=1))
    """Probability that an image skips the last residual branch. The first branch is never skipped; in between, the
    probability grows linearly (https://arxiv.org/abs/1603.09382)."""
    sync_batch_norm: bool = False
    """Compute norm statistics over all processes, for each forward pass."""

    epochs: int = field(metadata=within(at_least=1))
    """Passes over the training images."""
    global_batch_size: int = field(metadata=within(at_least=1))
    """Images per optimizer step, summed over all processes."""
    lr: float = field(metadata=within(above=0))
    """Peak learning rate for the global batch."""
    lr_batch_rule: Literal["none", "linear", "sqrt"] = "none"
    """How lr scales if only the batch size changes: in proportion, by the square root, or not."""
    lr_schedule: str = "step"
    """Schedule: step multiplies the rate by lr_step_factor every lr_step_epochs, multi_step at lr_milestones; cosine,
    linear and polynomial fall to lr_floor."""
    lr_step_epochs: int = field(default=30, metadata=within(at_least=1))
    """Epochs between two drops of the `step` schedule."""
    lr_milestones: tuple[float, ...] = field(default=(), metadata=within(above=0))
    """Epochs, or fractions, after which the `multi_step` schedule drops."""
    lr_step_factor: float = field(default=0.1, metadata=within(above=0))
    """Factor of each drop of `step` and `multi_step`."""
    lr_floor: float = field(default=0.0, metadata=within(at_least=0))
    """Learning rate that `cosine`, `linear` and `polynomial` reach just after the last step."""
    lr_power: float = field(default=2.0, metadata=within(above=0))
    """Exponent of the `polynomial` schedule."""
    warmup_epochs: float = field(default=0.0, metadata=within(at_least=0))
    """Epochs of linear warm-up to the peak learning rate, part of `epochs`; 0 for none."""
    warmup_start_factor: float = field(default=0.0, metadata=within(at_least=0, at_most=1))
    """Start of the warm-up, as a share of lr."""
    early_stopping_epochs: int = field(default=0, metadata=within(at_least=0))
    """Stop after this many epochs without a better top-1; 0 never stops early."""
    seed: int = field(default=0, metadata=within(at_least=0))
    """Random seed."""

    optimizer: str = "sgd"
    """Optimizer: sgd, sgdw, adamw, lamb, lars or muon."""
    momentum: float = field(default=0.0, metadata=within(at_least=0, below=1))
    """Momentum of SGD, SGDW, LARS and Muon; LAMB and AdamW use their own."""
    nesterov: bool = False
    """Use Nesterov's momentum in these optimizers."""
    weight_decay: float = field(default=0.0, metadata=within(at_least=0))
    """Weight decay. SGD, LARS and LAMB add it to the gradient or update; `sgdw`, `adamw` and `muon` shrink the
    weights."""
    fallback_lr_factor: float = field(default=1.0, metadata=within(above=0))
    """Muon's multiplier of the learning rate of parameters that are not convolutions."""
    decay_norms: bool = True
    """Apply weight decay to the weights and biases of norm layers, too."""
    decay_biases: bool = True
    """Apply weight decay to the biases of other layers, too."""
    head_lr_factor: float = field(default=1.0, metadata=within(above=0))
    """Multiplier of the learning rate of the last layer."""
    layer_lr_decay: float = field(default=1.0, metadata=within(above=0, at_most=1))
    """Multiplier of the learning rate from each residual block to the one before it, down to the first convolution
    (https://arxiv.org/abs/2106.08254, section 3.2)."""
    freeze_epochs: int = field(default=0, metadata=within(at_least=0))
    """Train only the last layer for N epochs; the norms then use their running statistics."""
    max_grad_norm: float = field(default=0.0, metadata=within(at_least=0))
    """Clip gradients to this global norm; 0 disables clipping."""
    ema_decay: float = field(default=0.0, metadata=within(at_least=0, below=1))
    """Decay of an exponential moving average of weights and buffers, adjusted to the length of the run (see
    train/step.py); 0 disables the average."""
    ema_every_steps: int = field(default=1, metadata=within(at_least=1))
    """Optimizer steps between two updates of the average."""
    publish: PublishedWeights = "model"
    """Weights that are kept as the run's result: the model or its moving average. Both are evaluated."""

    loss: str = "cross_entropy"
    """Training loss: cross_entropy or binary_cross_entropy."""
    label_smoothing: float = field(default=0.0, metadata=within(at_least=0, at_most=1))
    """Share of the target that is spread evenly over all classes (https://arxiv.org/abs/1512.00567)."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: weight the loss of an image by all images / (classes × images of its class)."""
    teacher_weight: float = field(default=0.0, metadata=within(at_least=0, at_most=1))
    """Share of the loss that is the distance from the predictions of `--teacher`, the Kullback-Leibler divergence
    (https://arxiv.org/abs/1503.02531)."""
    teacher_temperature: float = field(default=1.0, metadata=within(above=0))
    """Divisor of the logits of both networks in that distance, which is multiplied by its square."""
    bce_target_threshold: float = field(default=0.0, metadata=within(at_least=0, below=1))
    """Binary cross entropy sets targets above this to 1 and others to 0; 0 leaves the targets unchanged."""

    image_size: int = field(metadata=within(at_least=1))
    """Side of the training square in pixels; of the last epochs, if it changes."""
    initial_image_size: int = field(default=0, metadata=within(at_least=0))
    """Side of the training square in the first epochs, in pixels; 0 for image_size in all epochs."""
    image_size_ramp_start: int = field(default=1, metadata=within(at_least=1))
    """Last epoch at initial_image_size; then the size grows linearly, in multiples of 32 px."""
    image_size_ramp_end: int = field(default=1, metadata=within(at_least=1))
    """First epoch at image_size."""
    train_interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    """Interpolation of training crops, antialiased; `random` draws one of the two for each image."""
    eval_image_size: int = field(default=0, metadata=within(at_least=0))
    """Side of the center crop in evaluation, in pixels; 0 for image_size."""
    eval_crop_ratio: float = field(default=0.875, metadata=within(above=0, at_most=1))
    """Evaluation resizes the short side to its image size divided by this, then crops the center."""
    eval_interpolation: Interpolation = "bilinear"
    """Interpolation of evaluation, antialiased."""

    crop_scale_min: float = field(default=0.08, metadata=within(above=0, at_most=1))
    """Smallest share of the image's area that a training crop covers; the largest is 1."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """`uniform`: each image once an epoch; `balanced`: the same number of draws, each class with equal probability."""
    shuffle_window: int = field(default=0, metadata=within(at_least=0))
    """Shards to shuffle together, for shards on disks that are slow at random reads; 0 shuffles all images."""
    repeated_augmentation: int = field(default=1, metadata=within(at_least=1))
    """Views of each image in its global batch, each with its own crop. An epoch keeps its length, so it has that many
    times fewer different images (https://arxiv.org/abs/1901.09335)."""
    augment_policy: str = "none"
    """Policy: none, trivial_augment, rand_augment, timm_rand_augment or auto_augment."""
    rand_augment_num_ops: int = field(default=2, metadata=within(at_least=1))
    """Operations per image of both RandAugments."""
    rand_augment_magnitude: float = field(default=9.0, metadata=within(at_least=0, at_most=30))
    """Strength of both RandAugments: up to 30 for torchvision's, up to 10 for timm's."""
    rand_augment_magnitude_std: float = field(default=0.0, metadata=within(at_least=0))
    """Standard deviation of the strength of timm's RandAugment."""
    hflip_probability: float = field(default=0.0, metadata=within(at_least=0, at_most=1))
    """Probability of a horizontal flip."""
    alternating_flip: bool = False
    """Flip each image in every other epoch, instead of hflip_probability (https://arxiv.org/abs/2404.00498)."""
    rotation_degrees: float = field(default=0.0, metadata=within(at_least=0, at_most=180))
    """Largest rotation of a training image, in degrees."""
    brightness: float = field(default=0.0, metadata=within(at_least=0, at_most=1))
    """Color jitter: brightness is multiplied by a factor from [1 - x, 1 + x]."""
    contrast: float = field(default=0.0, metadata=within(at_least=0, at_most=1))
    """Color jitter: contrast is multiplied by a factor from [1 - x, 1 + x]."""
    saturation: float = field(default=0.0, metadata=within(at_least=0, at_most=1))
    """Color jitter: saturation is multiplied by a factor from [1 - x, 1 + x]."""
    hue: float = field(default=0.0, metadata=within(at_least=0, at_most=0.5))
    """Color jitter: hue is shifted by up to this share of the color wheel."""
    random_erasing_probability: float = field(default=0.0, metadata=within(at_least=0, at_most=1))
    """Probability of filling a rectangle with the mean color (https://arxiv.org/abs/1708.04896)."""
    mixup_alpha: float = field(default=0.0, metadata=within(at_least=0))
    """Mixup alpha (https://arxiv.org/abs/1710.09412); 0 disables mixup."""
    cutmix_alpha: float = field(default=0.0, metadata=within(at_least=0))
    """CutMix alpha (https://arxiv.org/abs/1905.04899); 0 disables CutMix. With both, each has probability 1/2."""
    mix_by_pair: bool = False
    """Draw mixup or CutMix and its weight for each pair of images, not once for the batch."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if each.type is float:  # 1 and 1.0 are the same recipe and must have the same fingerprint
                object.__setattr__(self, each.name, float(getattr(self, each.name)))
            elif each.type == tuple[float, ...]:  # JSON has lists
                object.__setattr__(self, each.name, tuple(float(value) for value in getattr(self, each.name)))
        problems = [f"{name} must be {allowed}, not {value!r}" for name, allowed, value in invalid_fields(self)]
        problems += self._contradictions()
        if problems:
            raise UserError("invalid recipe: " + "; ".join(problems))

    def _contradictions(self) -> Iterator[str]:
        """Yield the problems between fields that are each within their own range."""
        for lower, upper in (("warmup_epochs", "epochs"), ("initial_image_size", "image_size"), ("lr_floor", "lr")):
            if getattr(self, lower) > getattr(self, upper):
                yield f"{lower} ({getattr(self, lower)}) must not exceed {upper} ({getattr(self, upper)})"
        start, end, milestones = self.image_size_ramp_start, self.image_size_ramp_end, list(self.lr_milestones)
        if self.initial_image_size and end <= start:
            yield f"image_size_ramp_end ({end}) must be after image_size_ramp_start ({start})"
        if milestones != sorted(set(milestones)):
            yield f"lr_milestones {milestones} must increase"
        if self.lr_schedule == "multi_step" and not milestones:
            yield "lr_schedule multi_step needs lr_milestones"
        if self.nesterov and not self.momentum:
            yield "nesterov needs a momentum"
        if self.alternating_flip and self.hflip_probability:
            yield "alternating_flip replaces hflip_probability, which must be 0"
        magnitude, highest = self.rand_augment_magnitude, 10 if self.augment_policy == "timm_rand_augment" else 30
        if magnitude % 1 or magnitude > highest:
            yield f"rand_augment_magnitude ({magnitude:g}) must be an integer up to {highest}"
        if self.shuffle_window and self.sampling != "uniform":
            yield "shuffle_window needs sampling uniform, because balanced sampling draws from all images"
        if self.publish == "ema" and not self.ema_decay:
            yield "publish ema needs an ema_decay"

    @property
    def mixes(self) -> bool:
        """True if images are mixed, so that targets are probabilities."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def eval_size(self) -> int:
        """Side of the center crop in evaluation, in pixels."""
        return self.eval_image_size or self.image_size

    def non_default_fields(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, and those without a default."""
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        return {name: value for name, value in vars(self).items() if value != defaults[name]}

    def fingerprint(self, initial_weights_sha256: str = "", teacher_sha256: str = "") -> str:
        """Return a sha256 of everything that decides what a step computes: the fields that differ from their defaults,
        without `epochs` if no step depends on it, the initial weights, and the teacher."""
        deciding = self.non_default_fields()
        if initial_weights_sha256:
            deciding["init_from"] = initial_weights_sha256
        if teacher_sha256:
            deciding["teacher"] = teacher_sha256
        deciding.pop("lr_batch_rule", None)
        if self.lr_schedule in ("step", "multi_step") and not self.ema_decay:
            del deciding["epochs"]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def differences(self, other: "Recipe") -> list[str]:
        """Return the changes in `other`, as `field old → new`."""
        mine = vars(self)
        return [f"{name} {mine.get(name)} → {value}" for name, value in vars(other).items() if mine.get(name) != value]


def resize_size_for(image_size: int, eval_crop_ratio: float) -> int:
    """Return the short side in pixels: `image_size` divided by `eval_crop_ratio`, rounded down."""
    return math.floor(image_size / eval_crop_ratio)


def crop_ratio_for(image_size: int, resize_size: int) -> float:
    """Return a crop ratio for which `resize_size_for` gives `resize_size`."""
    ratio = image_size / resize_size
    # The division may have been rounded up.
    return ratio if resize_size_for(image_size, ratio) == resize_size else math.nextafter(ratio, 0)
