from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from resnet_in1k.step import TrainStep


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.arange(8) % 3


def snapshot(step: TrainStep) -> list[torch.Tensor]:
    momentum = [values["momentum_buffer"] for values in step.optimizer.state.values()]
    return [tensor.detach().clone() for tensor in (*step.model.parameters(), *momentum)]


def test_after_a_loss_that_is_not_finite_nothing_changes_any_more(tiny, batch):
    images, labels = batch
    step = TrainStep(tiny, 3, Accelerator(cpu=True))
    start = snapshot(step)
    step(images, labels, 0.01)
    before = snapshot(step)
    assert len(before) == 2 * len(start)  # momentum is there
    assert any(not torch.equal(a, b) for a, b in zip(start, before, strict=False))

    assert step(torch.full_like(images, float("nan")), labels, 0.01).isnan()
    step(images, labels, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(step), strict=True))


def test_the_weights_do_not_depend_on_the_loss_being_watched(tiny, batch):
    """Against the same optimizer without it, over three steps."""
    step = TrainStep(tiny, 3, Accelerator(cpu=True))
    plain = TrainStep(tiny, 3, Accelerator(cpu=True))
    plain._update_unless_diverged = lambda loss: (plain.optimizer.step(), plain.optimizer.zero_grad())
    for _ in range(3):
        step(*batch, 0.01)
        plain(*batch, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(step), snapshot(plain), strict=True))


def test_after_a_loss_that_is_not_finite_nothing_changes_under_a_gradient_scaler_either(tiny, batch):
    images, labels = batch
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    step = TrainStep(tiny, 3, accelerator)
    start = snapshot(step)
    step(images, labels, 0.01)
    before = snapshot(step)
    assert any(not torch.equal(a, b) for a, b in zip(start, before, strict=False))

    assert step(torch.full_like(images, float("nan")), labels, 0.01).isnan()
    assert step(images, labels, 0.01).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(step), strict=True))


def test_an_infinite_loss_with_finite_gradients_changes_nothing_under_a_gradient_scaler(tiny, batch):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    step = TrainStep(tiny, 3, accelerator)
    step._loss_function = torch.nn.CrossEntropyLoss()
    step.model.fc.bias.data[0] = -torch.inf  # as a logit that has overflown
    before = snapshot(step)
    assert step(*batch, 0.01).isinf()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(step), strict=True))


def test_under_a_gradient_scaler_momentum_starts_clean(tiny, batch):
    """A scaler usually skips its first steps; a fused SGD would then go on from momentum that nobody has written."""
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
