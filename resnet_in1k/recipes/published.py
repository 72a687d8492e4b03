"""The named recipes: what is published of training ResNet-50 on ImageNet-1k, and this project's own.

Their schedules run step by step, also where the original sets the rate once an epoch; docs/recipes.md compares them.
"""

from dataclasses import replace
from typing import NamedTuple

from resnet_in1k.recipes.recipe import Recipe


class Published(NamedTuple):
    """What the source reports on ImageNet-1k: accuracy in percent, by the recipe's evaluation. None: not published."""

    top1: float | None = None
    top5: float | None = None
    hardware: str = "not published"
    """With the time that the training took there."""
    gpu_hours: float | None = None
    """Number of GPUs × hours there."""


class NamedRecipe(NamedTuple):
    """A recipe and where it comes from."""

    recipe: Recipe
    source: str
    """Paper, repository or tutorial, and what is different here."""
    published: Published = Published()
    measured: str = "not measured"
    """By this project."""
    default_data: str = "data/imagenet"
    """Default of `--data`."""
    images_per_forward_pass: int = 0
    """At most, which decides the default of `--gradient-accumulation-steps`; 0: a complete batch."""
    needs_weights: bool = False
    """True if `--init-from` must be given."""


SGD = Recipe(
    model="resnet50",
    epochs=90,
    global_batch_size=256,
    lr=0.1,
    lr_batch_rule="linear",
    momentum=0.9,
    weight_decay=1e-4,
    image_size=224,
    hflip_probability=0.5,
)
"""What the recipes with SGD share."""

SGD_COSINE = replace(SGD, lr_schedule="cosine", decay_norms=False, label_smoothing=0.1)
"""What most of the newer ones share in addition."""

TUTORIAL = replace(
    SGD,
    epochs=20,
    lr_step_epochs=5,
    lr_step_factor=0.2,
    rotation_degrees=10,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.2,
)

A3 = Recipe(
    model="resnet50",
    zero_init_residual=True,
    epochs=100,
    global_batch_size=2048,
    loss="binary_cross_entropy",
    bce_target_threshold=0.2,
    optimizer="lamb",
    lr=8e-3,
    lr_batch_rule="sqrt",
    lr_schedule="cosine",
    lr_floor=1e-6,
    warmup_epochs=5,
    warmup_start_factor=1e-4 / 8e-3,
    weight_decay=0.02,
    decay_norms=False,
    decay_biases=False,
    max_grad_norm=1.0,
    image_size=160,
    train_interpolation="random",
    augment_policy="timm_rand_augment",
    rand_augment_magnitude=6,
    rand_augment_magnitude_std=0.5,
    hflip_probability=0.5,
    mixup_alpha=0.1,
    cutmix_alpha=1.0,
    eval_image_size=224,
    eval_crop_ratio=0.95,
    eval_interpolation="bicubic",
)

A2 = replace(
    A3,
    epochs=300,
    lr=5e-3,
    warmup_start_factor=1e-4 / 5e-3,
    stochastic_depth=0.05,
    image_size=224,
    repeated_augmentation=3,
    rand_augment_magnitude=7,
)

BUDGET_16 = replace(
    SGD,
    epochs=16,
    global_batch_size=4096,
    lr=1.7,
    lr_schedule="linear",
    warmup_epochs=2,
    warmup_start_factor=1e-4,
    decay_norms=False,
    label_smoothing=0.1,
    image_size=192,
    initial_image_size=160,
    image_size_ramp_start=12,
    image_size_ramp_end=14,
    eval_image_size=256,
)

SMALL_DATA = replace(
    SGD_COSINE,
    epochs=10,
    global_batch_size=64,
    lr=0.01,
    warmup_epochs=0.5,
    nesterov=True,
    ema_decay=0.99998,
    publish="ema",
    crop_scale_min=0.35,
    hflip_probability=0.0,
    alternating_flip=True,
)
"""What the recipes for some thousand images share."""

_TIMM = "R. Wightman, H. Touvron, H. Jégou, ResNet strikes back, https://arxiv.org/abs/2110.00476, procedure"
_FFCV = (
    "FFCV's ladder, https://github.com/libffcv/ffcv-imagenet; without its blur pooling and without its flips at test "
    "time, so that the weights are those of a plain ResNet-50: the published accuracy is with both"
)

RECIPES: dict[str, NamedRecipe] = {
    "tutorial": NamedRecipe(
        TUTORIAL,
        "the two-GPU ImageNet tutorial that this project grew from",
        Published(hardware="2 A100, 13 h", gpu_hours=26),
    ),
    "demo": NamedRecipe(
        replace(
            TUTORIAL,
            zero_init_residual=True,
            epochs=6,
            global_batch_size=64,
            optimizer="adamw",
            lr=3e-3,
            lr_batch_rule="sqrt",
            weight_decay=0.05,
            lr_schedule="cosine",
            warmup_epochs=1,
            label_smoothing=0.1,
            image_size=24,  # the digits were scanned at 8 px
            eval_crop_ratio=1.0,
            crop_scale_min=0.75,
            hflip_probability=0.0,  # a mirrored digit is another sign
            hue=0.0,  # a gray digit has no hue
        ),
        "this project: a ResNet-50 on handwritten digits, through the same path as ImageNet",
        measured="98.87 ± 0.20% of the digits, n = 5, in a minute on two CPU cores, see docs/benchmarks.md",
        default_data="digits",
    ),
    "tv1": NamedRecipe(
        replace(SGD, lr_schedule="multi_step", lr_milestones=(30, 60)),
        "torchvision, IMAGENET1K_V1, https://github.com/pytorch/vision/tree/main/references/classification",
        Published(top1=76.13, top5=92.862, hardware="8 V100"),
    ),
    "tv2": NamedRecipe(
        replace(
            SGD_COSINE,
            epochs=600,
            global_batch_size=1024,
            lr=0.5,
            warmup_epochs=5,
            warmup_start_factor=0.01,
            weight_decay=2e-5,
            ema_decay=0.99998,
            ema_every_steps=32,
            publish="ema",
            image_size=176,
            repeated_augmentation=4,
            augment_policy="trivial_augment",
            random_erasing_probability=0.1,
            mixup_alpha=0.2,
            cutmix_alpha=1.0,
            eval_image_size=224,
            eval_crop_ratio=224 / 232,
        ),
        "torchvision, IMAGENET1K_V2, https://github.com/pytorch/vision/issues/3995",
        Published(top1=80.858, top5=95.434, hardware="8 GPUs"),
    ),
    "nv-90": NamedRecipe(
        replace(SGD_COSINE, global_batch_size=2048, lr=2.048, warmup_epochs=8, momentum=0.875, weight_decay=2**-15),
        "NVIDIA, https://github.com/NVIDIA/DeepLearningExamples, PyTorch, ResNet-50 v1.5",
        Published(top1=77.12, hardware="8 A100, about 3 h", gpu_hours=24),
    ),
    "a3": NamedRecipe(A3, f"{_TIMM} A3", Published(top1=78.052, top5=93.78, hardware="4 V100, 15 h", gpu_hours=60)),
    "a2": NamedRecipe(A2, f"{_TIMM} A2", Published(top1=79.828, top5=94.56)),
    "a1": NamedRecipe(
        # Without the threshold, above which smoothed targets would be hard again.
        replace(A2, epochs=600, weight_decay=0.01, label_smoothing=0.1, bce_target_threshold=0.0, mixup_alpha=0.2),
        f"{_TIMM} A1",
        Published(top1=80.382, top5=94.598, hardware="4 V100, 4.6 days", gpu_hours=442),
    ),
    "budget-16": NamedRecipe(
        BUDGET_16, _FFCV, Published(top1=73.8, top5=90.8, hardware="8 A100, 14.9 min", gpu_hours=2.0)
    ),
    "budget-32": NamedRecipe(
        replace(BUDGET_16, epochs=32, image_size_ramp_start=24, image_size_ramp_end=28),
        _FFCV,
        Published(top1=76.6, top5=92.7, hardware="8 A100, 28.7 min", gpu_hours=3.8),
    ),
    "budget-88": NamedRecipe(
        replace(BUDGET_16, epochs=88, image_size_ramp_start=66, image_size_ramp_end=77),
        _FFCV,
        Published(top1=78.4, top5=94.1, hardware="8 A100, 77.2 min", gpu_hours=10.3),
    ),
    "goyal": NamedRecipe(
        replace(
            SGD,
            zero_init_residual=True,
            global_batch_size=8192,
            lr=3.2,
            lr_schedule="multi_step",
            lr_milestones=(30, 60, 80),
            warmup_epochs=5,
            warmup_start_factor=1 / 32,  # from 0.1
            nesterov=True,
            decay_norms=False,
        ),
        "P. Goyal et al., Accurate, large minibatch SGD, https://arxiv.org/abs/1706.02677; accuracy and time "
        "are those of tensorpack's reproduction, https://github.com/tensorpack/benchmarks, ResNet-Horovod",
        Published(top1=76.1, hardware="256 P100, 1 h 9 min", gpu_hours=294),
    ),
    "mlperf-lars": NamedRecipe(
        replace(
            SGD,
            epochs=37,
            global_batch_size=3200,
            optimizer="lars",
            lr=11.0,
            lr_schedule="polynomial",
            lr_floor=1e-4,
            warmup_epochs=2,
            weight_decay=5e-5,
            decay_norms=False,
            decay_biases=False,
            label_smoothing=0.1,
            crop_scale_min=0.05,
        ),
        "NVIDIA's MLPerf Training v4.0, https://github.com/mlcommons/training_results_v4.0; the accuracy is the "
        "benchmark's target, which it reaches after 35 epochs",
        Published(top1=75.9, hardware="8 H200, 12 min", gpu_hours=1.6),
    ),
    # The source's decay does not scale with the rate: 3e-4 there is 3e-4 / 0.03 here.
    "funmatch": NamedRecipe(
        replace(
            SGD_COSINE,
            epochs=1200,
            global_batch_size=4096,
            optimizer="adamw",
            lr=0.03,
            lr_batch_rule="sqrt",
            momentum=0.0,
            weight_decay=0.01,
            decay_biases=False,
            warmup_epochs=16.0,  # 5,000 steps
            max_grad_norm=1.0,
            label_smoothing=0.0,
            teacher_weight=1.0,
            crop_scale_min=0.05,
            mixup_alpha=1.0,
        ),
        "L. Beyer et al., A good teacher is patient and consistent, https://arxiv.org/abs/2106.05237, by its code, "
        "https://github.com/google-research/big_vision, configs/proj/distill/bit_i1k.py; its 82.8% is of BiT's "
        "ResNet-50, with group norm and weight standardization",
    ),
    "one-gpu-24gb": NamedRecipe(
        replace(A3, ema_decay=0.99998, ema_every_steps=32, publish="ema"),
        "this project: a3 with a moving average of weights, in forward passes of 256 images; a3 took 60 hours "
        "of one V100, so it is a weekend for a card as fast as that",
        images_per_forward_pass=256,
    ),
    # Few steps: Muon, large updates from the first epoch on, small images first, crops that keep a third of the image.
    "sprint": NamedRecipe(
        replace(
            SMALL_DATA,
            zero_init_residual=True,
            epochs=5,
            optimizer="muon",
            lr_batch_rule="sqrt",
            weight_decay=0.05,
            decay_biases=False,
            image_size=128,
            initial_image_size=64,
            image_size_ramp_end=4,
        ),
        "this project: the most for five epochs at 128 px on Imagenette, by the rules of fastai's leaderboard, "
        "https://github.com/fastai/imagenette",
        Published(hardware="2 CPU cores"),
        measured="84.65 ± 0.16% on Imagenette, n = 3, see docs/evidence.md",
        default_data="data/imagenette",
    ),
    # Small steps for what the network knows, larger ones for the new last layer, which first learns alone.
    "finetune": NamedRecipe(
        replace(SMALL_DATA, head_lr_factor=10.0, freeze_epochs=1),
        "this project: all of a trained network on other images, its last layer faster",
        measured="at 128 px, see docs/evidence.md",
        needs_weights=True,
    ),
    "linear-probe": NamedRecipe(
        replace(SMALL_DATA, lr=0.05, warmup_epochs=0.0, weight_decay=0.0, freeze_epochs=10, label_smoothing=0.0),
        "this project: only the last layer of a trained network, on other images",
        measured="at 128 px, see docs/evidence.md",
        needs_weights=True,
    ),
}
