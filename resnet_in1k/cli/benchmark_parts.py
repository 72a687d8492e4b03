"""What each part of a recipe costs: a training step with it, and the input with it, beside those without."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.data.loader import Batch
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train.step import MovingAverage, TrainStep

OFF = "off"
NUM_CLASSES = 1000
STEP_PARTS: dict[str, dict[str, Any]] = {
    OFF: {},
    "flip, rotation, color jitter": {
        "hflip_probability": 0.5,
        "rotation_degrees": 10,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.2,
        "hue": 0.2,
    },
    "random erasing": {"random_erasing_probability": 0.1},
    "mixup or cutmix": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
    "binary cross entropy": {"loss": "binary_cross_entropy"},
    "stochastic depth": {"stochastic_depth": 0.05},
    "no decay on norms": {"decay_norms": False},
    "gradient clipping": {"max_grad_norm": 1.0},
    "moving average": {"ema_decay": 0.99998, "ema_every_steps": 1},
    "sgdw": {"optimizer": "sgdw"},
    "adamw": {"optimizer": "adamw"},
    "lamb": {"optimizer": "lamb"},
    "lars": {"optimizer": "lars"},
    "muon": {"optimizer": "muon"},
}
"""Recipe fields by name, of what the device does."""
INPUT_PARTS: dict[str, dict[str, Any]] = {
    OFF: {},
    "bicubic": {"train_interpolation": "bicubic"},
    "alternating flip": {"alternating_flip": True},
    "repeated augmentation, 4": {"repeated_augmentation": 4},
    "trivial_augment": {"augment_policy": "trivial_augment"},
    "rand_augment": {"augment_policy": "rand_augment"},
    "timm_rand_augment": {
        "augment_policy": "timm_rand_augment",
        "rand_augment_magnitude": 6,
        "rand_augment_magnitude_std": 0.5,
    },
    "auto_augment": {"augment_policy": "auto_augment"},
}
"""And of what the loader workers do."""
PLAIN = {
    "hflip_probability": 0.0,
    "rotation_degrees": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
}
"""What switches the tutorial's augmentation off."""


def random_images(
    batch_size: int, image_size: int, device: torch.device, generator: torch.Generator | None = None
) -> torch.Tensor:
    """(B, 3, S, S) uint8 in channels_last, as the loader gives them."""
    shape = (batch_size, image_size, image_size, 3)
    return torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator).permute(0, 3, 1, 2)


def step_ways(
    recipe: Recipe, accelerator: Accelerator, compile: bool, rate: Callable[[Callable[[], object]], float]
) -> dict[str, Callable[[], float]]:
    """By part, images/s of augmentation, training step and moving average on a batch that is on the device."""
    ways = {}
    size, batch_size, device = recipe.image_size, recipe.global_batch_size, accelerator.device
    images = random_images(batch_size, size, device)
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    for name, fields in STEP_PARTS.items():
        take_step = _step_of(replace(recipe, **{**PLAIN, **fields}), accelerator, compile, images, labels)
        ways[name] = lambda take_step=take_step: rate(take_step)
    return ways


def _step_of(
    recipe: Recipe, accelerator: Accelerator, compile: bool, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    augmentation = Augmentation(recipe, NUM_CLASSES, compile=compile)
    step = TrainStep(recipe, NUM_CLASSES, accelerator, compile=compile)
    average = None
    if recipe.ema_decay:
        average = MovingAverage(step.plain_copy(), StepCounts(recipe, 1, 1, 100 * recipe.global_batch_size))
    numbers = itertools.count(1)

    def take_step() -> None:
        number = next(numbers)
        step(*augmentation.prepare(Batch(images, labels, labels, number)), 1e-3, number)
        if average is not None:
            average.update(step.model, number)

    return take_step


def input_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """By part, the recipe whose crops the workers make."""
    return {name: replace(recipe, **{**PLAIN, **fields}) for name, fields in INPUT_PARTS.items()}


def beside_off(result: dict[str, Any], base: str = OFF) -> dict[str, Any]:
    """The ratio of each part to none, or of each way to another one, from their medians."""
    parts = [name for name in result if not name.endswith("_range")]
    return {"parts": {name: result[name] / result[base] for name in parts}, "base": base, **result}
