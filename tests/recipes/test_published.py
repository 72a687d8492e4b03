import pytest

from resnet_in1k.augment.auto_augment import POLICIES
from resnet_in1k.optim.losses import LOSSES
from resnet_in1k.optim.lr import LR_SCHEDULES
from resnet_in1k.optim.optimizers import OPTIMIZERS
from resnet_in1k.recipes.published import RECIPES, NamedRecipe
from resnet_in1k.recipes.recipe import resize_size_for


def test_numbers_of_the_tutorial():
    recipe = RECIPES["tutorial"].recipe
    assert recipe.model == "resnet50"
    assert (recipe.epochs, recipe.global_batch_size) == (20, 256)
    assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 1e-4)
    assert (recipe.lr_schedule, recipe.lr_step_epochs, recipe.lr_step_factor) == ("step", 5, 0.2)
    assert (recipe.image_size, recipe.eval_crop_ratio, recipe.rotation_degrees) == (224, 0.875, 10)
    assert {getattr(recipe, name) for name in ("brightness", "contrast", "saturation", "hue")} == {0.2}
    assert (recipe.hflip_probability, recipe.crop_scale_min, recipe.label_smoothing) == (0.5, 0.08, 0)
    assert (recipe.loss, recipe.optimizer, recipe.warmup_epochs) == ("cross_entropy", "sgd", 0)


@pytest.mark.parametrize("named", RECIPES.values(), ids=RECIPES)
def test_every_recipe_can_be_built_and_says_what_is_published(named: NamedRecipe):
    recipe = named.recipe
    assert recipe.loss in LOSSES
    assert recipe.optimizer in OPTIMIZERS
    assert recipe.lr_schedule in LR_SCHEDULES
    assert recipe.augment_policy in POLICIES
    assert named.source
    assert named.published.hardware
    assert named.measured
    if named.published.top1 is not None:
        assert 70 < named.published.top1 < 82
        assert "http" in named.source


def test_published_numbers_of_each_recipe():
    """Epochs, batch, optimizer, peak rate, decay, training and evaluation size, as the sources have them."""
    published = {
        "tv1": (90, 256, "sgd", 0.1, 1e-4, 224, 224, 256),
        "tv2": (600, 1024, "sgd", 0.5, 2e-5, 176, 224, 232),
        "nv-90": (90, 2048, "sgd", 2.048, 1 / 32768, 224, 224, 256),
        "a3": (100, 2048, "lamb", 8e-3, 0.02, 160, 224, 235),
        "a2": (300, 2048, "lamb", 5e-3, 0.02, 224, 224, 235),
        "a1": (600, 2048, "lamb", 5e-3, 0.01, 224, 224, 235),
        "budget-16": (16, 4096, "sgd", 1.7, 1e-4, 192, 256, 292),
        "budget-32": (32, 4096, "sgd", 1.7, 1e-4, 192, 256, 292),
        "budget-88": (88, 4096, "sgd", 1.7, 1e-4, 192, 256, 292),
        "goyal": (90, 8192, "sgd", 3.2, 1e-4, 224, 224, 256),
        "funmatch": (1200, 4096, "adamw", 0.03, 3e-4 / 0.03, 224, 224, 256),
        "mlperf-lars": (37, 3200, "lars", 11.0, 5e-5, 224, 224, 256),
    }
    for name, numbers in published.items():
        r = RECIPES[name].recipe
        assert numbers == (
            *(r.epochs, r.global_batch_size, r.optimizer, r.lr, r.weight_decay),
            *(r.image_size, r.eval_size, resize_size_for(r.eval_size, r.eval_crop_ratio)),
        ), name
