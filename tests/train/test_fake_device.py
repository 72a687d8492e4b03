"""Augmentation, training step and prediction on devices that have no values: nothing may make the host wait for one."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from helpers.fake_device import META, HostMustNotWait, HostWaits, sees_values

from resnet_in1k.augment import pipeline
from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.data.loader import Batch
from resnet_in1k.evaluate.evaluation import padded, predict_batch
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.optim.losses import LOSSES
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train.step import MovingAverage, TrainStep

RECIPE = replace(RECIPES["tutorial"].recipe, model="resnet18", global_batch_size=8, image_size=32, momentum=0.9)
"""With every augmentation."""


def batch_on(device: torch.device) -> Batch:
    labels = torch.zeros(8, dtype=torch.int64, device=device)
    return Batch(torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device), labels, labels, step=3)


def prepare(augmentation: Augmentation) -> int:
    """Augments a batch on the meta device; the number of copies to it."""
    normalize(torch.zeros(1, 3, 8, 8, device=META))  # its constants go there once
    with HostMustNotWait() as guard:
        batch = batch_on(META)
        images, targets = augmentation(batch.images, batch.labels, batch.step)
    assert (images.device, targets.device) == (META, META)
    assert images.is_contiguous(memory_format=torch.channels_last)
    return guard.num_copies


def test_a_batch_is_augmented_after_one_copy():
    assert prepare(Augmentation(RECIPE, 6)) == 1


class Wrong:
    """An operation that makes the host wait."""

    name = "wrong"
    works_on_uint8 = False

    def __init__(self, way: str):
        self.way = way

    def draw(self, generator, batch_size):
        return torch.rand(batch_size, 1, generator=generator), None

    def apply(self, images, targets, draws, shared):
        device, factor = images.device, draws[:, 0]
        ways = {
            "item": lambda: images * factor.max().item(),
            "if": lambda: images if factor.max() > 0 else -images,
            "mask": lambda: images[factor > 0],
            "nonzero": lambda: images.index_select(0, (factor > 0).nonzero().flatten()),
            "tolist": lambda: images * sum(factor.tolist()),
            "index of the CPU": lambda: images[torch.arange(8)],
            "tensor of the CPU": lambda: images * torch.ones(8, 1, 1, 1),
            "copied to the CPU": lambda: images * float(factor.cpu()[0]),
            "made of values": lambda: images * torch.tensor([1.0, 2.0, 3.0], device=device).view(3, 1, 1),
        }
        return ways[self.way](), targets


WRONG_WAYS = [
    *("item", "if", "mask", "nonzero", "tolist"),
    *("index of the CPU", "tensor of the CPU", "copied to the CPU"),
    pytest.param("made of values", marks=pytest.mark.skipif(not sees_values(), reason="not seen with this torch")),
]


@pytest.mark.parametrize("way", WRONG_WAYS)
def test_an_operation_that_makes_the_host_wait_is_found(monkeypatch: pytest.MonkeyPatch, way: str):
    operations = [*pipeline.OPERATIONS, lambda recipe, num_classes: Wrong(way)]
    monkeypatch.setattr(pipeline, "OPERATIONS", operations)
    with pytest.raises((HostWaits, RuntimeError)):  # NotImplementedError is a RuntimeError
        prepare(Augmentation(RECIPE, 6))


def training_step(device: torch.device) -> TrainStep:
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = device
    return TrainStep(RECIPE, 6, accelerator, gradient_accumulation_steps=2)


@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_training_steps_and_moving_average(dense: bool):
    """Forward, backward, update, and an update of the average."""
    step = training_step(META)
    average = MovingAverage(ResNet("resnet18", 6).to(META), StepCounts(replace(RECIPE, ema_decay=0.9), 1, 1, 80))
    images, labels = torch.zeros(8, 3, 32, 32, device=META), torch.zeros(8, dtype=torch.int64, device=META)
    targets = torch.zeros(8, 6, device=META) if dense else labels
    with HostMustNotWait() as guard:
        losses = [step(images, targets, 0.1 * number, number) for number in (1, 2)]
        for number in (1, 2):  # a copy, then an average
            average.update(step.model, number)
    assert guard.num_copies == 0
    assert {(loss.shape, loss.device) for loss in losses} == {((), META)}
    assert len(step.optimizer.state) == len(list(step.model.parameters()))
    assert step.optimizer.param_groups[0]["lr"] == 0.2


def test_a_loss_that_is_read_at_each_step_is_found(monkeypatch: pytest.MonkeyPatch):
    def read(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return loss if loss.item() < 10 else loss / 2

    monkeypatch.setitem(LOSSES, "cross_entropy", lambda recipe: read)
    step, batch = training_step(META), batch_on(META)
    images = normalize(batch.images)
    with HostMustNotWait(), pytest.raises(RuntimeError, match="meta"):
        step(images, batch.labels, 0.1, 1)


@pytest.mark.parametrize("size", [8, 3], ids=["full", "last"])
def test_prediction(size: int):
    """A full batch, and one that is padded to it."""
    model, batch = ResNet("resnet18", 6).to(META).eval(), batch_on(META)
    normalize(batch.images)  # its constants go there once
    with torch.inference_mode(), HostMustNotWait() as guard:
        images = normalize(padded(batch.images[:size], 8))
        kept = predict_batch(model, images, batch.labels[:size], batch.indices[:size])
    assert guard.num_copies == 0
    assert {(name, tensor.shape, tensor.device) for name, tensor in kept.items()} == {
        ("indices", (size,), META),
        ("labels", (size,), META),
        ("top_ids", (size, 5), META),
        ("confidences", (size,), META),
        ("losses", (size,), META),
    }
