"""The moving average against a loop by hand, and its decay against torchvision's formula."""

from dataclasses import replace

import pytest
import torch

from resnet_in1k.model.ema import MovingAverage, adjusted_decay, steps_between_updates
from resnet_in1k.model.weights import weights_to_save
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train.checkpoint import ModelGroup

TV2 = RECIPES["tv2"].recipe


def test_decay_on_imagenet_is_torchvisions():
    """Its training reference: alpha = min(1, (1 - decay) * batch * steps / epochs), then 1 - alpha."""
    schedule = StepCounts(TV2, 8, 1, 1_281_167)
    assert 1 - adjusted_decay(schedule) == pytest.approx((1 - 0.99998) * 1024 * 32 / 600)
    short = StepCounts(replace(TV2, epochs=30, warmup_epochs=1), 8, 1, 1_281_167)
    assert 1 - adjusted_decay(short) == pytest.approx((1 - 0.99998) * 1024 * 32 / 30)
    assert adjusted_decay(StepCounts(replace(TV2, epochs=1, warmup_epochs=0, ema_decay=0.9), 8, 1, 1_281_167)) == 0


@pytest.mark.parametrize(
    ("images", "epochs", "batch"), [(1_281_167, 600, 1024), (9_469, 20, 64), (1_281_167, 16, 4096)]
)
def test_the_average_covers_the_same_share_of_any_run(images: int, epochs: int, batch: int):
    """By (1 - decay) of one update times the number of updates, its length in time constants."""
    recipe = replace(TV2, epochs=epochs, global_batch_size=batch, warmup_epochs=1)
    schedule = StepCounts(recipe, 1, 1, images)
    updates = schedule.total_steps / steps_between_updates(schedule)
    assert updates * (1 - adjusted_decay(schedule)) == pytest.approx(25.6, rel=0.01)


def test_updates_are_those_of_a_loop_by_hand(tiny: Recipe):
    """A copy until warm-up ends, then an average of weights and statistics, at every other step."""
    recipe = replace(tiny, epochs=5, warmup_epochs=1, ema_decay=1 - 1e-6, ema_every_steps=2)
    schedule = StepCounts(recipe, 1, 1, 32)  # four steps an epoch
    decay = adjusted_decay(schedule)
    assert 0.1 < decay < 0.99
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    average = MovingAverage(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)), schedule)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 13):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model(torch.randn(2, 3, 4, 4))  # which updates the statistics
        average.update(model, step)
        for name, value in model.state_dict().items():
            if step in (2, 4):
                expected[name] = value.clone()
            elif step > 4 and step % 2 == 0 and value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
        if step >= 2:
            state = average.model.state_dict()
            for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
                torch.testing.assert_close(state[name], expected[name])


def test_there_is_an_update_in_each_epoch_of_small_data():
    schedule = StepCounts(replace(TV2, global_batch_size=8, epochs=1, warmup_epochs=0), 1, 1, 37)
    assert steps_between_updates(schedule) == 4
    model = torch.nn.Linear(2, 2)
    average = MovingAverage(torch.nn.Linear(2, 2), schedule)
    for step in range(1, 5):
        average.update(model, step)
    assert torch.equal(average.model.weight, model.weight)


def test_it_has_no_state_but_its_tensors(tiny: Recipe):
    """Going on from saved tensors at any step is going on without interruption."""
    schedule = StepCounts(replace(tiny, warmup_epochs=0, ema_decay=1 - 1e-6), 1, 1, 32)
    torch.manual_seed(0)
    models = [torch.nn.BatchNorm1d(3) for _ in range(8)]
    for model in models:
        torch.nn.init.normal_(model.weight)
    whole = MovingAverage(torch.nn.BatchNorm1d(3), schedule)
    for step, model in enumerate(models, start=1):
        whole.update(model, step)
    for interrupted_after in (1, 2, 5):
        first, second = (MovingAverage(torch.nn.BatchNorm1d(3), schedule) for _ in range(2))
        for step, model in enumerate(models[:interrupted_after], start=1):
            first.update(model, step)
        ModelGroup(second.model).load(weights_to_save(first.model))
        for step, model in enumerate(models[interrupted_after:], start=interrupted_after + 1):
            second.update(model, step)
        assert torch.equal(second.model.weight, whole.model.weight)
