"""What changes with the batch, the epochs or the image size of a named recipe."""

from dataclasses import replace

import pytest

from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.scaling import describe_scaling, scale

GOYAL, TV2, A3, BUDGET, TUTORIAL = (RECIPES[name].recipe for name in ("goyal", "tv2", "a3", "budget-16", "tutorial"))


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
    changed = scale(recipe, global_batch_size=global_batch_size)
    assert changed.lr == pytest.approx(lr)
    assert changed.lr_floor / changed.lr == pytest.approx(recipe.lr_floor / recipe.lr)
    assert replace(changed, lr=recipe.lr, lr_floor=recipe.lr_floor) == replace(
        recipe, global_batch_size=global_batch_size
    )


def test_nothing_given_nothing_changed():
    for named in RECIPES.values():
        recipe = named.recipe
        assert scale(recipe) == recipe
        sizes = {name: getattr(recipe, name) for name in ("epochs", "global_batch_size", "image_size")}
        assert scale(recipe, **sizes) == recipe
        assert describe_scaling(recipe, recipe) == []


def test_warm_up_and_milestones_keep_their_share_of_the_run():
    assert scale(GOYAL, epochs=45).lr_milestones == (15, 30, 40)
    assert scale(GOYAL, epochs=45).warmup_epochs == 2.5
    assert scale(GOYAL, epochs=1).lr_milestones == pytest.approx((1 / 3, 2 / 3, 8 / 9))
    assert scale(TUTORIAL, epochs=10) == replace(TUTORIAL, epochs=10), "the period of `step` stays: it can grow"


@pytest.mark.parametrize(("epochs", "ramp"), [(16, (12, 14)), (32, (24, 28)), (8, (6, 7)), (1, (1, 2))])
def test_the_epochs_in_which_images_grow_keep_their_share(epochs: int, ramp: tuple[int, int]):
    recipe = scale(BUDGET, epochs=epochs)
    assert (recipe.image_size_ramp_start, recipe.image_size_ramp_end) == ramp


def test_other_image_sizes_keep_their_ratio():
    small = scale(TV2, image_size=88)
    assert (small.image_size, small.eval_size, small.initial_image_size) == (88, 112, 0)
    small = scale(BUDGET, image_size=96)
    assert (small.initial_image_size, small.image_size, small.eval_size) == (64, 96, 128)
    assert scale(BUDGET, image_size=24).initial_image_size == 24


def test_changes_are_told():
    assert describe_scaling(GOYAL, scale(GOYAL, epochs=45, global_batch_size=512)) == [
        "batch 8192 → 512: lr 3.2 → 0.2 by the recipe's rule, linear",
        "epochs 90 → 45, in proportion: warmup_epochs 5 → 2.5; lr_milestones 30, 60, 80 → 15, 30, 40",
    ]
    given = replace(scale(GOYAL, epochs=45, global_batch_size=512), lr=0.3, warmup_epochs=1)
    assert describe_scaling(GOYAL, given) == [
        "batch 8192 → 512: lr 0.3 as given; the recipe's rule (linear) gives 0.2",
        "epochs 90 → 45, in proportion: lr_milestones 30, 60, 80 → 15, 30, 40",
    ]
    without_rule = replace(GOYAL, lr_batch_rule="none")
    assert describe_scaling(without_rule, replace(without_rule, global_batch_size=16)) == [
        "batch 8192 → 16: lr stays 3.2, the recipe has no rule"
    ]
    assert describe_scaling(TV2, scale(TV2, image_size=88)) == [
        "image_size 176 → 88, in proportion: eval_image_size 224 → 112"
    ]
