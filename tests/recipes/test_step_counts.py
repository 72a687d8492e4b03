from dataclasses import replace

import pytest

from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts, accumulation_steps, scaled, train_image_size
from resnet_in1k.utils.errors import UserError

GOYAL, TV2, A3, BUDGET, TUTORIAL = (RECIPES[name].recipe for name in ("goyal", "tv2", "a3", "budget-16", "tutorial"))
RECIPE = replace(TUTORIAL, epochs=3, global_batch_size=24, image_size=224)


def test_sizes_by_hand():
    """100 images in batches of 24 on two processes, in three parts each."""
    schedule = StepCounts(RECIPE, num_processes=2, gradient_accumulation_steps=3, num_train_images=100)
    assert (schedule.per_process_batch_size, schedule.per_device_batch_size) == (12, 4)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (4, 12)
    assert [schedule.epoch_of(step) for step in range(1, 13)] == [1] * 4 + [2] * 4 + [3] * 4
    assert [schedule.steps_into_epoch(step) for step in range(1, 13)] == [1, 2, 3, 4] * 3
    assert [step for step in range(1, 13) if schedule.is_last_in_epoch(step)] == [4, 8, 12]


@pytest.mark.parametrize(("limit", "steps"), [(12, 1), (11, 2), (5, 3), (3, 4), (2, 6), (1, 12), (0, 1)])
def test_number_of_accumulation_steps_divides_the_batch(limit: int, steps: int):
    assert accumulation_steps(24, 2, limit) == steps


@pytest.mark.parametrize(
    ("num_processes", "parts", "words"),
    [
        (5, 1, "5 processes × 1 accumulation step; use a multiple of 5"),
        (1, 7, "1 process × 7 accumulation steps; use a multiple of 7"),
        (4, 4, "4 processes × 4 accumulation steps; use a multiple of 16"),
    ],
)
def test_batch_that_cannot_be_divided_is_refused(num_processes: int, parts: int, words: str):
    with pytest.raises(UserError, match=rf"^--global-batch-size 24 cannot be divided evenly among {words}$"):
        StepCounts(RECIPE, num_processes, parts, 100)


def ramp(initial: int, final: int, start: int, end: int) -> Recipe:
    return replace(
        RECIPE,
        initial_image_size=initial,
        image_size=final,
        image_size_ramp_start=start,
        image_size_ramp_end=end,
    )


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        (RECIPE, [224] * 5),
        # 128 to 224 px in eight epochs: 140, 152, 164, 176, 188, 200 and 212 px between them.
        (ramp(128, 224, 2, 10), [128, 128, 128, 160, 160, 192, 192, 192, 224, 224, 224]),
        (ramp(32, 96, 1, 3), [32, 64, 96, 96]),
        (ramp(160, 192, 1, 2), [160, 192, 192]),
        # Sizes that are no multiples of 32 px at the ends: 62.5, 75 and 87.5 px between them.
        (ramp(50, 100, 1, 5), [50, 64, 64, 96, 100, 100]),
        (ramp(64, 64, 1, 4), [64, 64, 64, 64]),
        (replace(ramp(128, 224, 2, 10), initial_image_size=0), [224, 224, 224]),
    ],
    ids=["off", "128 to 224", "32 to 96", "one epoch", "50 to 100", "constant", "ramp without a first size"],
)
def test_image_size_of_each_epoch_by_hand(recipe: Recipe, sizes: list[int]):
    assert [train_image_size(recipe, epoch) for epoch in range(1, len(sizes) + 1)] == sizes


@pytest.mark.parametrize(("batch", "num_processes", "unit"), [(18, 2, 4), (33, 1, 2), (33, 3, 6)])
def test_each_process_needs_pairs_where_neighbors_are_mixed(batch: int, num_processes: int, unit: int):
    recipe = replace(RECIPE, global_batch_size=batch, mixup_alpha=0.2)
    with pytest.raises(UserError, match=f" × 1 accumulation step, in pairs for mixing; use a multiple of {unit}$"):
        StepCounts(recipe, num_processes, 1, 100)
    assert (
        StepCounts(replace(recipe, mixup_alpha=0), num_processes, 1, 100).per_process_batch_size * num_processes
        == batch
    )


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
