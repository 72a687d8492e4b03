"""The named recipes: what is published of training ResNet-50 on ImageNet-1k, and this project's own.

Their schedules run step by step, also where the original sets the rate once an epoch; docs/recipes.md compares them.
"""

from dataclasses import dataclass, replace

from resnet_in1k.recipes import values
from resnet_in1k.recipes.recipe import Recipe


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe and where it comes from."""

    recipe: Recipe
    source: str
    """Paper, repository or tutorial, and what is different here."""
    top1: float | None = None
    """Published top-1 accuracy on ImageNet-1k in percent, by the recipe's evaluation; None: not published."""
    top5: float | None = None
    hardware: str = "not published"
    """On which that was measured, and the time it took there."""
    gpu_hours: float | None = None
    """Number of GPUs × hours there; None: not published."""
    measured: str = "not measured"
    """What this project has measured of it."""
    default_data: str = "data/imagenet"
    """What `--data` is if it is not given."""
    images_per_forward_pass: int = 0
    """At most, which decides what `--gradient-accumulation-steps` is if it is not given; 0: a complete batch."""
    needs_weights: bool = False
    """Whether `--init-from` must be given."""


_TIMM = "R. Wightman, H. Touvron, H. Jégou, ResNet strikes back, https://arxiv.org/abs/2110.00476, procedure"
_FFCV = (
    "FFCV's ladder, https://github.com/libffcv/ffcv-imagenet; without its blur pooling and without its flips at test \
time, so that the weights are those of a plain ResNet-50: the published accuracy is with both"
)

RECIPES: dict[str, NamedRecipe] = {
    "tutorial": NamedRecipe(
        values.TUTORIAL,
        source="the two-GPU ImageNet tutorial that this project grew from",
        hardware="2 A100, 13 h",
        gpu_hours=26,
    ),
    "demo": NamedRecipe(
        values.DEMO,
        default_data="digits",
        source="this project: a ResNet-50 on handwritten digits, through the same path as ImageNet",
        measured="98.6% of the digits in minutes on two CPU cores, see README",
    ),
    "tv1": NamedRecipe(
        values.TV1,
        source="torchvision, IMAGENET1K_V1, https://github.com/pytorch/vision/tree/main/references/classification",
        top1=76.13,
        top5=92.862,
        hardware="8 V100",
    ),
    "tv2": NamedRecipe(
        values.TV2,
        source="torchvision, IMAGENET1K_V2, https://github.com/pytorch/vision/issues/3995",
        top1=80.858,
        top5=95.434,
        hardware="8 GPUs",
    ),
    "nv-90": NamedRecipe(
        values.NV_90,
        source="NVIDIA, https://github.com/NVIDIA/DeepLearningExamples, PyTorch, ResNet-50 v1.5",
        top1=77.12,
        hardware="8 A100, about 3 h",
        gpu_hours=24,
    ),
    "a3": NamedRecipe(values.A3, f"{_TIMM} A3", top1=78.052, top5=93.78, hardware="4 V100, 15 h", gpu_hours=60),
    "a2": NamedRecipe(values.A2, f"{_TIMM} A2", top1=79.828, top5=94.56),
    "a1": NamedRecipe(values.A1, f"{_TIMM} A1", top1=80.382, top5=94.598, hardware="4 V100, 4.6 days", gpu_hours=442),
    "budget-16": NamedRecipe(values.BUDGET_16, _FFCV, top1=73.8, top5=90.8, hardware="8 A100, 14.9 min", gpu_hours=2.0),
    "budget-32": NamedRecipe(
        replace(values.BUDGET_16, epochs=32, image_size_ramp_start=24, image_size_ramp_end=28),
        _FFCV,
        top1=76.6,
        top5=92.7,
        hardware="8 A100, 28.7 min",
        gpu_hours=3.8,
    ),
    "budget-88": NamedRecipe(
        replace(values.BUDGET_16, epochs=88, image_size_ramp_start=66, image_size_ramp_end=77),
        _FFCV,
        top1=78.4,
        top5=94.1,
        hardware="8 A100, 77.2 min",
        gpu_hours=10.3,
    ),
    "goyal": NamedRecipe(
        values.GOYAL,
        source="P. Goyal et al., Accurate, large minibatch SGD, https://arxiv.org/abs/1706.02677; accuracy and time "
        "are those of tensorpack's reproduction, https://github.com/tensorpack/benchmarks, ResNet-Horovod",
        top1=76.1,
        hardware="256 P100, 1 h 9 min",
        gpu_hours=294,
    ),
    "mlperf-lars": NamedRecipe(
        values.MLPERF_LARS,
        source="NVIDIA's MLPerf Training v4.0, https://github.com/mlcommons/training_results_v4.0; the accuracy is the "
        "benchmark's target, which it reaches after 35 epochs",
        top1=75.9,
        hardware="8 H200, 12 min",
        gpu_hours=1.6,
    ),
    "one-gpu-24gb": NamedRecipe(
        replace(values.A3, ema_decay=0.99998, ema_every_steps=32, publish="ema"),
        source="this project: a3 with a moving average of weights, in forward passes of 256 images; a3 took 60 hours "
        "of one V100, so it is a weekend for a card as fast as that",
        images_per_forward_pass=256,
    ),
    "sprint": NamedRecipe(
        values.SPRINT,
        source="this project: the most for five epochs at 128 px on Imagenette, by the rules of fastai's leaderboard, "
        "https://github.com/fastai/imagenette",
        hardware="2 CPU cores",
        measured="84.6 ± 0.2% on Imagenette, n = 3",
        default_data="data/imagenette",
    ),
    "finetune": NamedRecipe(
        values.FINETUNE,
        source="this project: all of a trained network on other images, its last layer faster",
        measured="at 128 px, see docs/recipes.md",
        needs_weights=True,
    ),
    "linear-probe": NamedRecipe(
        values.LINEAR_PROBE,
        source="this project: only the last layer of a trained network, on other images",
        measured="at 128 px, see docs/recipes.md",
        needs_weights=True,
    ),
}
