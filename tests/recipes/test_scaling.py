"""What changes with the batch, the epochs or the image size of a named recipe."""

from dataclasses import replace

import pytest

from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.scaling import scaled_fields

GOYAL, TV2, A3, BUDGET, TUTORIAL = (RECIPES[name].recipe for name in ("goyal", "tv2", "a3", "budget-16", "tutorial"))


def scaled(recipe: Recipe, **sizes: int) -> Recipe:
    return replace(recipe, **scaled_fields(recipe, **sizes))


@pytest.mark.parametrize(
    ("recipe", "global_batch_size", "lr"),
    [
        (GOYAL, 256, 0.1),  # the paper's own 0.1 × kn / 256
        (GOYAL, 16384, 6.4),
        (A3, 512, 4e-3),
        (A3, 8192, 16e-3),
        (replace(TUTORIAL, lr_batch_rule="none"), 64, 0.1),
    ],
)
def test_learning_rate_follows_the_batch_by_the_recipes_rule(recipe: Recipe, global_batch_size: int, lr: float):
    changed = scaled(recipe, global_batch_size=global_batch_size)
    assert changed.lr == pytest.approx(lr)
    assert changed.lr_floor / changed.lr == pytest.approx(recipe.lr_floor / recipe.lr)
    assert replace(changed, lr=recipe.lr, lr_floor=recipe.lr_floor) == replace(
        recipe, global_batch_size=global_batch_size
    )


def test_warm_up_and_milestones_keep_their_share_of_the_run():
    assert scaled(GOYAL, epochs=45).lr_milestones == (15, 30, 40)
    assert scaled(GOYAL, epochs=45).warmup_epochs == 2.5
    assert scaled(GOYAL, epochs=1).lr_milestones == pytest.approx((1 / 3, 2 / 3, 8 / 9))
    assert scaled(TUTORIAL, epochs=10) == replace(TUTORIAL, epochs=10), "the period of `step` stays: it can grow"


@pytest.mark.parametrize(("epochs", "ramp"), [(16, (12, 14)), (32, (24, 28)), (8, (6, 7)), (1, (1, 2))])
def test_the_epochs_in_which_images_grow_keep_their_share(epochs: int, ramp: tuple[int, int]):
    recipe = scaled(BUDGET, epochs=epochs)
    assert (recipe.image_size_ramp_start, recipe.image_size_ramp_end) == ramp


def test_other_image_sizes_keep_their_ratio():
    small = scaled(TV2, image_size=88)
    assert (small.image_size, small.eval_size, small.initial_image_size) == (88, 112, 0)
    small = scaled(BUDGET, image_size=96)
    assert (small.initial_image_size, small.image_size, small.eval_size) == (64, 96, 128)
    assert scaled(BUDGET, image_size=24).initial_image_size == 24
