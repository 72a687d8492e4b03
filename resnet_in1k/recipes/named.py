"""The named recipes, each with its source and what is known of its results."""

from dataclasses import dataclass, replace

from resnet_in1k.recipes.recipe import Recipe


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe and where it comes from."""

    recipe: Recipe
    default_data: str
    """What `--data` is if it is not given."""
    source: str
    """Paper, repository or tutorial."""
    top1: str
    """Published or measured top-1 accuracy, and which of the two."""
    hardware: str
    """And the time it took there."""


_TUTORIAL = Recipe(
    model="resnet50",
    epochs=20,
    global_batch_size=256,
    lr=0.1,
    lr_schedule="step",
    lr_step_epochs=5,
    lr_step_factor=0.2,
    momentum=0.9,
    weight_decay=1e-4,
    image_size=224,
    hflip_probability=0.5,
    rotation_degrees=10,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.2,
)

_DEMO = replace(
    _TUTORIAL,
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
    hflip_probability=0.0,  # a mirrored digit is another sign
    hue=0.0,  # a grey digit has no hue
)

RECIPES: dict[str, NamedRecipe] = {
    "tutorial": NamedRecipe(
        _TUTORIAL,
        default_data="data/imagenet",
        source="the two-GPU ImageNet tutorial that this project grew from",
        top1="not published, not measured here",
        hardware="2×A100, 13 h (published)",
    ),
    "demo": NamedRecipe(
        _DEMO,
        default_data="digits",
        source="this project: a ResNet-50 on handwritten digits, through the same path as ImageNet",
        top1="measured, see README",
        hardware="two CPU cores, minutes (measured, see README)",
    ),
}
