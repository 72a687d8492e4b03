"""Augmentation, training step and prediction on devices that have no values: nothing may make the host wait for one."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from helpers.fake_device import META, HostMustNotWait, HostWaits

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.data.loader import Batch
from resnet_in1k.evaluate.evaluation import padded, predict_batch
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.train.step import MovingAverage, TrainStep

RECIPE = replace(RECIPES["tutorial"].recipe, model="resnet18", global_batch_size=8, image_size=32, momentum=0.9)
"""With every augmentation."""


def batch_on(device: torch.device) -> Batch:
    labels = torch.zeros(8, dtype=torch.int64, device=device)
    return Batch(torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device), labels, labels, step=3)


def test_a_batch_is_augmented_after_one_copy():
    """That of the random draws."""
    normalize(torch.zeros(1, 3, 8, 8, device=META))  # its constants go there once
    batch = batch_on(META)
    with HostMustNotWait() as guard:
        images, targets = Augmentation(RECIPE, 6)(batch.images, batch.labels, batch.step)
    assert guard.num_copies == 1
    assert (images.device, targets.device) == (META, META)
    assert images.is_contiguous(memory_format=torch.channels_last)


WAYS_TO_WAIT = {
    "item": lambda values: values * values.max().item(),
    "mask": lambda values: values[values > 0],
    "index of the CPU": lambda values: values[torch.arange(3)],
    "copied to the CPU": lambda values: values * float(values.cpu()[0]),
}


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
def test_what_makes_the_host_wait_is_found(way: str):
    with HostMustNotWait(), pytest.raises((HostWaits, RuntimeError)):  # NotImplementedError is a RuntimeError
        WAYS_TO_WAIT[way](torch.zeros(3, device=META))


@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_training_steps_and_moving_average(dense: bool):
    """Forward, backward, update, and an update of the average."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = META
    step = TrainStep(RECIPE, 6, accelerator, gradient_accumulation_steps=2)
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
        ("top_ids", (size, 5), META),
        ("confidences", (size,), META),
        ("losses", (size,), META),
    }
