"""The training step; the moving average against a loop by hand, and its decay against torchvision's formula."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from resnet_in1k.model.weights import weights_to_save
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train.step import MovingAverage, TrainStep, adjusted_ema_decay


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.arange(8) % 3


def test_momentum_is_zero_before_the_first_step_that_the_scaler_does_not_skip(tiny, batch):
    """A scaler usually skips its first steps; a fused SGD would then use momentum that was never written."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    step = TrainStep(replace(tiny, momentum=0.9), 3, accelerator)
    parameter = step.model.fc.bias
    for gradient in (float("inf"), 1.0):
        scaler.scale(torch.zeros(())).item()  # as in a backward
        for each in step.model.parameters():
            each.grad = torch.full_like(each, gradient)
        before = parameter.detach().clone()
        scaler.step(step.optimizer)
        scaler.update()
    # One good step of momentum SGD from rest: less lr times the unscaled gradient and decay.
    expected = before - step.optimizer.param_groups[0]["lr"] * (1.0 / 2.0**9 + tiny.weight_decay * before)
    torch.testing.assert_close(parameter.detach(), expected)


def test_steps_are_undone(tiny):
    """For an optimizer that counts its steps in its parameter groups, too."""
    step = TrainStep(tiny, 6, Accelerator(cpu=True))
    before = weights_to_save(step.model)
    with step.rolled_back():
        step(torch.randn(8, 3, 32, 32), torch.arange(8) % 6, lr=1.0, step=1)
        step.optimizer.param_groups[0]["count"] = 1
        assert not torch.equal(before["fc.weight"], step.model.fc.weight)
        assert len(step.optimizer.state) == len(list(step.model.parameters()))
    after = weights_to_save(step.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not step.optimizer.state
    assert "count" not in step.optimizer.param_groups[0]
    assert all(parameter.grad is None for parameter in step.model.parameters())


@pytest.mark.slow
def test_each_image_size_is_compiled_for_itself(tiny: Recipe, narrow: None, monkeypatch: pytest.MonkeyPatch):
    """By default torch compiles a second size for any size, which is slower: 11 of the 16 epochs of budget-16."""
    sizes: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        sizes.extend(each.shape[-1] for each in inputs if isinstance(each, torch.Tensor) and each.ndim == 4)
        assert not any(isinstance(each, torch.SymInt) for each in inputs)
        return graph

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *network, **how: plain(*network, backend=backend, **how))
    step = TrainStep(tiny, 6, Accelerator(cpu=True), compile=True)
    for size in (32, 48, 64, 48):
        step(torch.randn(8, 3, size, size), torch.arange(8) % 6, 0.01, 1)
    assert {32, 48, 64} <= set(sizes)
    assert all(type(size) is int for size in sizes)


class Plain(torch.nn.Module):
    """A network without norms, as a batch's parts then give the whole's gradients."""

    architecture = "plain"

    def __init__(self, architecture: str, num_classes: int, zero_init_residual: bool = False):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.fc = torch.nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(images).relu().mean(dim=(2, 3)))


@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_accumulated_parts_equal_the_whole_batch(
    tiny: Recipe, batch, monkeypatch: pytest.MonkeyPatch, optimizer: str, max_grad_norm: float
):
    """k parts of b images and one of k × b, to 1e-6, over five steps; dense targets, clipped or not."""
    monkeypatch.setattr("resnet_in1k.train.step.ResNet", Plain)
    recipe = replace(tiny, optimizer=optimizer, max_grad_norm=max_grad_norm, label_smoothing=0.1)
    images, labels = batch
    targets = torch.nn.functional.one_hot(labels, 3) * 0.7 + torch.nn.functional.one_hot(labels.flip(0), 3) * 0.3
    trained = []
    for num_parts in (1, 2, 4):
        step = TrainStep(recipe, 3, Accelerator(cpu=True), gradient_accumulation_steps=num_parts)
        losses = [step(images, targets, 0.01, 1).item() for _ in range(5)]
        trained.append((losses, weights_to_save(step.model)))
    for losses, weights in trained[1:]:
        assert losses == pytest.approx(trained[0][0], abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(value, trained[0][1][name], rtol=0, atol=1e-6)


def test_gradients_are_clipped_to_the_norm(tiny: Recipe, batch):
    """With SGD without momentum and decay the update is the clipped gradient times lr."""
    recipe = replace(tiny, momentum=0.0, weight_decay=0.0, max_grad_norm=0.01)
    step = TrainStep(recipe, 3, Accelerator(cpu=True))
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    step(*batch, 0.5, 1)
    update = torch.cat([(old - new).flatten() for old, new in zip(before, step.model.parameters(), strict=True)])
    assert update.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


TV2 = RECIPES["tv2"].recipe


def test_decay_on_imagenet_is_torchvisions():
    """Its training reference: alpha = min(1, (1 - decay) * batch * steps / epochs), then 1 - alpha."""
    schedule = StepCounts(TV2, 8, 1, 1_281_167)
    assert 1 - adjusted_ema_decay(schedule) == pytest.approx((1 - 0.99998) * 1024 * 32 / 600)
    short = StepCounts(replace(TV2, epochs=30, warmup_epochs=1), 8, 1, 1_281_167)
    assert 1 - adjusted_ema_decay(short) == pytest.approx((1 - 0.99998) * 1024 * 32 / 30)
    assert adjusted_ema_decay(StepCounts(replace(TV2, epochs=1, warmup_epochs=0, ema_decay=0.9), 8, 1, 1_281_167)) == 0


def test_updates_are_those_of_a_loop_by_hand(tiny: Recipe):
    """A copy until warm-up ends, then an average of weights and statistics, at every other step."""
    recipe = replace(tiny, epochs=5, warmup_epochs=1, ema_decay=1 - 1e-6, ema_every_steps=2)
    schedule = StepCounts(recipe, 1, 1, 32)  # four steps an epoch
    decay = adjusted_ema_decay(schedule)
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
