from dataclasses import replace

import pytest
import torch

from resnet_in1k.optim.lr import lr_at
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


@pytest.mark.parametrize(
    ("changes", "make_scheduler"),
    [
        (
            {"lr_schedule": "step", "lr_step_epochs": 2, "lr_step_factor": 0.5},
            lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=8, gamma=0.5),
        ),
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
