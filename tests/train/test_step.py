import contextlib
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from resnet_in1k.model.weights import weights_to_save
from resnet_in1k.optim.optimizers import OPTIMIZERS
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.train.step import TrainStep


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.arange(8) % 3


def snapshot(step: TrainStep) -> list[torch.Tensor]:
    momentum = [values["momentum_buffer"] for values in step.optimizer.state.values()]
    return [tensor.detach().clone() for tensor in (*step.model.parameters(), *momentum)]


def test_no_weight_changes_after_a_nonfinite_loss(tiny, batch):
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


def test_guard_does_not_change_the_weights_of_finite_steps(tiny, batch):
    """Against the same optimizer without it, over three steps."""
    step = TrainStep(tiny, 3, Accelerator(cpu=True))
    plain = TrainStep(tiny, 3, Accelerator(cpu=True))
    plain._guard.step = lambda loss: contextlib.nullcontext()
    for _ in range(3):
        step(*batch, 0.01)
        plain(*batch, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(step), snapshot(plain), strict=True))


def test_no_weight_changes_after_a_nonfinite_loss_under_a_gradient_scaler(tiny, batch):
    images, labels = batch
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    step = TrainStep(tiny, 3, accelerator)
    start = snapshot(step)
    step(images, labels, 0.01)
    before = snapshot(step)
    assert any(not torch.equal(a, b) for a, b in zip(start, before, strict=False))

    assert step(torch.full_like(images, float("nan")), labels, 0.01).isnan()
    assert step(images, labels, 0.01).isnan()  # its own loss is finite, but it has changed nothing
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(step), strict=True))


def test_infinite_loss_with_finite_gradients_changes_nothing_under_a_gradient_scaler(tiny, batch):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    step = TrainStep(tiny, 3, accelerator)
    step._loss_function = torch.nn.CrossEntropyLoss()
    step.model.fc.bias.data[0] = -torch.inf  # a logit that has overflowed
    before = snapshot(step)
    assert step(*batch, 0.01).isinf()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(step), strict=True))


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


class Lookahead(torch.optim.Optimizer):
    """An optimizer that knows nothing of found_inf, has state of other shapes than its parameters, and a counter."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["norm"], state["slow"] = torch.zeros(1), parameter.clone()
                state["norm"] += parameter.grad.norm()
                parameter -= group["lr"] * parameter.grad / (1 + state["norm"])
                if group["count"] % 2 == 0:
                    state["slow"].lerp_(parameter, 0.5)
                    parameter.copy_(state["slow"])


@pytest.mark.parametrize("optimizer", ["lookahead", "adamw", "rmsprop"])
def test_guard_holds_for_any_optimizer(tiny, batch, monkeypatch, optimizer: str):
    """Weights and state are those of before the loss that was not finite, and stay so."""
    makers = {
        "lookahead": lambda model, recipe, fused: Lookahead(model.parameters(), recipe.lr),
        "adamw": lambda model, recipe, fused: torch.optim.AdamW(model.parameters(), fused=True),
        "rmsprop": lambda model, recipe, fused: torch.optim.RMSprop(model.parameters()),
    }
    monkeypatch.setitem(OPTIMIZERS, optimizer, makers[optimizer])
    step = TrainStep(replace(tiny, optimizer=optimizer), 3, Accelerator(cpu=True))

    def tensors() -> list[torch.Tensor]:
        state = [value for values in step.optimizer.state.values() for value in values.values()]
        return [tensor.detach().clone() for tensor in (*step.model.parameters(), *state)]

    images, labels = batch
    start = tensors()
    for _ in range(2):
        step(images, labels, 0.01)
    before = tensors()
    assert any(not torch.equal(a, b) for a, b in zip(start, before, strict=False))
    assert step(torch.full_like(images, float("nan")), labels, 0.01).isnan()
    step(images, labels, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True))


def test_dense_targets_are_index_targets_where_they_say_the_same(tiny, batch):
    images, labels = batch
    losses = []
    for targets in (labels, torch.nn.functional.one_hot(labels, 3).float()):
        step = TrainStep(tiny, 3, Accelerator(cpu=True), gradient_accumulation_steps=2)
        losses.append([step(images, targets, 0.01).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_steps_are_undone(tiny):
    """For an optimizer that counts its steps in its parameter groups, too."""
    step = TrainStep(tiny, 6, Accelerator(cpu=True))
    before = weights_to_save(step.model)
    with step.rolled_back():
        step(torch.randn(8, 3, 32, 32), torch.arange(8) % 6, lr=1.0)
        step.optimizer.param_groups[0]["count"] = 1
        assert not torch.equal(before["fc.weight"], step.model.fc.weight)
        assert len(step.optimizer.state) == len(list(step.model.parameters()))
    after = weights_to_save(step.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not step.optimizer.state
    assert "count" not in step.optimizer.param_groups[0]
    assert all(parameter.grad is None for parameter in step.model.parameters())


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
        losses = [step(images, targets, 0.01).item() for _ in range(5)]
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
    step(*batch, 0.5)
    update = torch.cat([(old - new).flatten() for old, new in zip(before, step.model.parameters(), strict=True)])
    assert update.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgdw", "adamw", "lamb", "lars", "muon"])
def test_no_optimizer_changes_weights_after_a_nonfinite_loss(tiny: Recipe, batch, optimizer: str):
    images, labels = batch
    recipe = replace(tiny, optimizer=optimizer, max_grad_norm=1.0, decay_norms=False)
    step = TrainStep(recipe, 3, Accelerator(cpu=True))
    for _ in range(2):
        assert step(images, labels, 0.01).isfinite()
    before = weights_to_save(step.model)
    assert step(torch.full_like(images, float("nan")), labels, 0.01).isnan()
    assert step(images, labels, 0.01).isnan()
    parameters = dict(step.model.named_parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters.items())
