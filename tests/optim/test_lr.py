from dataclasses import replace

import pytest
import torch

from resnet_in1k.optim.lr import LR_SCHEDULES, describe_lr, lr_at
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts

TUTORIAL, DEMO = (RECIPES[name].recipe for name in ("tutorial", "demo"))


def steps_of(recipe: Recipe, steps_per_epoch: int) -> StepCounts:
    return StepCounts(recipe, 1, 1, steps_per_epoch * recipe.global_batch_size)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(1, 0.1), (5, 0.1), (6, 0.02), (10, 0.02), (11, 0.004), (15, 0.004), (16, 0.0008), (20, 0.0008)],
)
def test_schedule_of_the_tutorial(epoch: int, expected: float):
    """× 0.2 every 5 epochs, at 5004 steps an epoch as with 1,281,167 images in batches of 256."""
    schedule = StepCounts(TUTORIAL, 2, 1, 1_281_167)
    assert schedule.steps_per_epoch == 5004
    for step in ((epoch - 1) * 5004 + 1, epoch * 5004):
        assert lr_at(step, schedule) == pytest.approx(expected, rel=1e-12)


def test_warmup_then_cosine_by_hand():
    schedule = steps_of(replace(DEMO, lr=0.4, lr_schedule="cosine", warmup_epochs=1, epochs=5), 4)
    # Four steps an epoch: four of warm-up, then sixteen from cos 0 on.
    assert [lr_at(step, schedule) for step in (1, 2, 3, 4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert lr_at(5, schedule) == pytest.approx(0.4)  # cos 0
    assert lr_at(9, schedule) == pytest.approx(0.2 * (1 + 2**-0.5))  # cos 45°
    assert lr_at(13, schedule) == pytest.approx(0.2)  # cos 90°
    assert 0 < lr_at(20, schedule) < 0.004  # one step before zero


def test_half_an_epoch_of_warmup_before_steps():
    schedule = steps_of(replace(TUTORIAL, lr=1.0, warmup_epochs=0.5), 4)
    assert [lr_at(step, schedule) for step in (1, 2, 3, 20, 21)] == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.2])


def test_warmup_may_last_all_epochs():
    schedule = steps_of(replace(DEMO, lr=0.8, warmup_epochs=2, epochs=2), 4)
    assert [lr_at(step, schedule) for step in range(1, 9)] == pytest.approx([0.1 * step for step in range(1, 9)])


def torch_rates(make_scheduler, num_steps: int, lr: float) -> list[float]:
    """What a scheduler of torch sets before each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_after_warmup_is_torchs():
    """From the first step after warm-up on."""
    schedule = steps_of(replace(DEMO, lr=0.4, lr_schedule="cosine", warmup_epochs=1.5, epochs=6), 7)
    warmup = 10  # round(1.5 × 7), to even
    num_steps = 42 - warmup
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=num_steps), num_steps, 0.4)
    assert [lr_at(step, schedule) for step in range(warmup + 1, 43)] == pytest.approx(theirs)
    assert [lr_at(step, schedule) for step in range(1, warmup + 1)] == pytest.approx([0.04 * n for n in range(1, 11)])


def test_step_schedule_is_torchs():
    recipe = replace(TUTORIAL, lr=0.3, lr_step_epochs=3, lr_step_factor=0.5, epochs=10)
    schedule = steps_of(recipe, 7)
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3 * 7, gamma=0.5), 70, 0.3)
    assert [lr_at(step, schedule) for step in range(1, 71)] == pytest.approx(theirs)


def test_new_schedule_gets_recipe_epochs_done_and_progress(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def falling(recipe: Recipe, epochs_done: float, progress: float) -> float:
        calls.append((recipe, epochs_done, progress))
        return 1 - progress

    monkeypatch.setitem(LR_SCHEDULES, "falling", falling)
    recipe = replace(DEMO, lr=0.4, lr_schedule="falling", warmup_epochs=1, epochs=5)
    schedule = steps_of(recipe, 4)
    assert lr_at(4, schedule) == 0.4  # the peak, by warm-up
    assert not calls
    assert [lr_at(step, schedule) for step in (5, 14, 20)] == pytest.approx([0.4, 0.4 * 7 / 16, 0.4 * 1 / 16])
    assert calls == [(recipe, 1.0, 0.0), (recipe, 3.25, 9 / 16), (recipe, 4.75, 15 / 16)]
    assert describe_lr(recipe) == "1 epoch of warm-up to 0.4, then falling"


def test_schedule_in_words():
    assert describe_lr(TUTORIAL) == "0.1, × 0.2 every 5 epochs"
    assert describe_lr(replace(TUTORIAL, lr_step_epochs=1)) == "0.1, × 0.2 every epoch"
    assert describe_lr(replace(TUTORIAL, warmup_epochs=2.5)) == "2.5 epochs of warm-up to 0.1, × 0.2 every 5 epochs"
    assert describe_lr(DEMO) == "1 epoch of warm-up to 0.02, then cosine to 0"
    goyal = RECIPES["goyal"].recipe
    assert describe_lr(goyal) == "5 epochs of warm-up from 0.1 to 3.2, × 0.1 after 30, 60, 80 epochs"
    lars = RECIPES["mlperf-lars"].recipe
    assert describe_lr(lars) == "2 epochs of warm-up to 11, then polynomial of power 2 to 0.0001"
    assert describe_lr(RECIPES["a3"].recipe) == "5 epochs of warm-up from 0.0001 to 0.008, then cosine to 1e-06"


@pytest.mark.parametrize(
    ("changes", "make_scheduler"),
    [
        (
            {"lr_schedule": "multi_step", "lr_milestones": (1, 2.5), "lr_step_factor": 0.1},
            lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 10], gamma=0.1),
        ),
        (
            {"lr_schedule": "cosine", "lr_floor": 0.05},
            lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.05),
        ),
        (
            {"lr_schedule": "linear"},
            lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20),
        ),
        (
            {"lr_schedule": "polynomial", "lr_power": 1.5},
            lambda optimizer: torch.optim.lr_scheduler.PolynomialLR(optimizer, 20, power=1.5),
        ),
    ],
)
def test_schedules_are_torchs(changes: dict, make_scheduler):
    """Five epochs of four steps, without warm-up."""
    schedule = steps_of(replace(DEMO, lr=0.4, epochs=5, warmup_epochs=0, **changes), 4)
    assert [lr_at(step, schedule) for step in range(1, 21)] == pytest.approx(torch_rates(make_scheduler, 20, 0.4))


def test_polynomial_to_a_floor_by_hand():
    schedule = steps_of(replace(DEMO, lr=1.1, lr_floor=0.1, lr_schedule="polynomial", epochs=2, warmup_epochs=0), 5)
    assert [lr_at(step, schedule) for step in (1, 6, 10)] == pytest.approx([1.1, 0.1 + 0.25, 0.1 + 0.01])


def test_warm_up_starts_where_it_is_told():
    """torch's LinearLR, which has the rate of n steps done where ours has that of the n-th."""
    recipe = replace(DEMO, lr=3.2, epochs=2, warmup_epochs=1.5, warmup_start_factor=1 / 32)
    schedule = steps_of(recipe, 4)
    theirs = torch_rates(
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 32, 1.0, total_iters=6), 7, 3.2
    )
    assert theirs[0] == pytest.approx(0.1)
    assert [lr_at(step, schedule) for step in range(1, 7)] == pytest.approx(theirs[1:])
