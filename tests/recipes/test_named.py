import dataclasses

import pytest

from resnet_in1k.data.sources import digits
from resnet_in1k.recipes.named import RECIPES, NamedRecipe


def test_numbers_of_the_tutorial():
    recipe = RECIPES["tutorial"].recipe
    assert recipe.model == "resnet50"
    assert (recipe.epochs, recipe.global_batch_size) == (20, 256)
    assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 1e-4)
    assert (recipe.lr_schedule, recipe.lr_step_epochs, recipe.lr_step_factor) == ("step", 5, 0.2)
    assert (recipe.image_size, recipe.eval_resize_size, recipe.rotation_degrees) == (224, 256, 10)
    assert {getattr(recipe, name) for name in ("brightness", "contrast", "saturation", "hue")} == {0.2}
    assert (recipe.hflip_probability, recipe.crop_scale_min, recipe.label_smoothing) == (0.5, 0.08, 0)
    assert (recipe.loss, recipe.optimizer, recipe.warmup_epochs) == ("cross_entropy", "sgd", 0)


def test_demo_leaves_digits_readable():
    """A mirrored digit is another sign, and a grey one has no hue."""
    recipe = RECIPES["demo"].recipe
    assert (recipe.hflip_probability, recipe.hue) == (0, 0)
    assert RECIPES["demo"].default_data == digits.__name__.rpartition(".")[2]


@pytest.mark.parametrize("named", RECIPES.values(), ids=RECIPES)
def test_every_recipe_has_its_origin_and_its_results(named: NamedRecipe):
    for field in dataclasses.fields(named):
        assert getattr(named, field.name), field.name
    assert "measured" in named.top1 or "published" in named.top1
