"""Augmentation, training step and prediction on devices that have no values: nothing may make the host wait for one."""

import contextlib
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from helpers.fake_device import META, HostMustNotWait, HostWaits, fake_cuda, sees_values
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from resnet_in1k.augment import pipeline
from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.packing import pack
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.data.loader import Batch
from resnet_in1k.evaluate.evaluation import padded, predict_batch
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.optim.losses import LOSSES
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.train import step as step_module
from resnet_in1k.train.step import TrainStep

RECIPE = replace(RECIPES["tutorial"].recipe, model="resnet18", global_batch_size=8, image_size=32, momentum=0.9)
"""With every augmentation."""


def batch_on(device: torch.device) -> Batch:
    labels = torch.zeros(8, dtype=torch.int64, device=device)
    return Batch(torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device), labels, labels, step=3)


def prepare(augmentation: Augmentation) -> int:
    """Augments a batch on the meta device; the number of copies to it."""
    normalize(torch.zeros(1, 3, 8, 8, device=META))  # its constants go there once
    with HostMustNotWait() as guard:
        images, targets = augmentation.prepare(batch_on(META))
    assert (images.device, targets.device) == (META, META)
    assert images.is_contiguous(memory_format=torch.channels_last)
    return guard.num_copies


@pytest.mark.parametrize("compile", [False, True])
def test_a_batch_is_augmented_after_one_copy(monkeypatch: pytest.MonkeyPatch, compile: bool):
    """With draws as they are arranged, and as a compiled augmentation takes them."""
    monkeypatch.setattr(pipeline, "device_type", lambda: "meta")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert prepare(Augmentation(RECIPE, 6, compile=compile)) == 1


def test_a_batch_is_augmented_on_a_device_that_says_that_it_is_cuda():
    augmentation = Augmentation(RECIPE, 6)
    packed = pack(augmentation.arrange(augmentation.draw(3)), pin=False)
    with fake_cuda() as mode:
        batch = batch_on(torch.device("cuda"))
        normalize(batch.images)
        sent = replace(packed, buffer=mode.from_tensor(packed.buffer)).to(torch.device("cuda"))
        with HostMustNotWait() as guard:
            images, targets = augmentation.apply_arranged(batch.images, batch.labels, sent)
    assert guard.num_copies == 0
    assert (images.shape, images.device.type, targets.device.type) == ((8, 3, 32, 32), "cuda", "cuda")


class Wrong:
    """An operation that makes the host wait."""

    name = "wrong"

    def __init__(self, way: str):
        self.way = way

    def draw(self, generator, batch_size):
        return {"factor": torch.rand(batch_size, generator=generator)}

    def apply(self, images, targets, draws):
        device, factor = images.device, draws["factor"]
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


@pytest.mark.parametrize("way", ["item", "nonzero", "tensor of the CPU"])
def test_it_is_found_on_a_device_that_says_that_it_is_cuda(way: str):
    errors = (HostWaits, RuntimeError, DataDependentOutputException, DynamicOutputShapeException)
    with fake_cuda(), HostMustNotWait(), pytest.raises(errors):
        Wrong(way).apply(torch.ones(8, 3, 4, 4, device="cuda"), None, {"factor": torch.ones(8, device="cuda")})


def training_step(device: torch.device) -> TrainStep:
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = device
    return TrainStep(RECIPE, 6, accelerator, gradient_accumulation_steps=2)


@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_training_steps(dense: bool):
    """Forward, backward, and an update that the guard undoes where needed, as this optimizer is not fused."""
    step = training_step(META)
    images, labels = torch.zeros(8, 3, 32, 32, device=META), torch.zeros(8, dtype=torch.int64, device=META)
    targets = torch.zeros(8, 6, device=META) if dense else labels
    with HostMustNotWait() as guard:
        losses = [step(images, targets, lr) for lr in (0.1, 0.2)]
    assert guard.num_copies == 0
    assert {(loss.shape, loss.device) for loss in losses} == {((), META)}
    assert len(step.optimizer.state) == len(list(step.model.parameters()))
    assert step.optimizer.param_groups[0]["lr"] == 0.2


class OnCuda(ResNet):
    """Made there at once: a module of fake tensors cannot be moved."""

    def __init__(self, *args):
        with torch.device("cuda"):
            super().__init__(*args)

    def to(self, *args, **kwargs):
        return self


def test_training_steps_with_a_fused_optimizer(monkeypatch: pytest.MonkeyPatch):
    """On a device that says that it is CUDA; all but the backward, which such tensors cannot do."""
    monkeypatch.setattr(step_module, "ResNet", OnCuda)
    monkeypatch.setattr(step_module, "has_fused_optimizers", lambda device: True)
    updates = []

    def backward(loss: torch.Tensor) -> None:
        assert (loss.shape, loss.device.type) == ((), "cuda")
        for parameter in step.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    with fake_cuda():
        step = training_step(torch.device("cuda"))
        monkeypatch.setattr(step._accelerator, "backward", backward)
        step.optimizer.register_step_post_hook(lambda *_: updates.append(step.optimizer.found_inf))
        images, labels = torch.zeros(8, 3, 32, 32, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
        with HostMustNotWait() as guard:
            for _ in range(2):
                step(images, labels, 0.1)
    assert guard.num_copies == 0
    assert [each.device.type for each in updates] == ["cuda", "cuda"]


def test_a_loss_that_is_read_at_each_step_is_found(monkeypatch: pytest.MonkeyPatch):
    def read(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return loss if loss.item() < 10 else loss / 2

    monkeypatch.setitem(LOSSES, "cross_entropy", lambda recipe: read)
    step, batch = training_step(META), batch_on(META)
    images = normalize(batch.images)
    with HostMustNotWait(), pytest.raises(RuntimeError, match="meta"):
        step(images, batch.labels, 0.1)


@pytest.mark.parametrize("size", [8, 3], ids=["full", "last"])
@pytest.mark.parametrize("kind", ["meta", "cuda"])
def test_prediction(kind: str, size: int):
    """Of a full batch, and of one that is padded to it."""
    device = torch.device(kind)
    with fake_cuda() if kind == "cuda" else contextlib.nullcontext():
        model = (OnCuda("resnet18", 6) if kind == "cuda" else ResNet("resnet18", 6).to(device)).eval()
        batch = batch_on(device)
        normalize(batch.images)  # its constants go there once
        with torch.inference_mode(), HostMustNotWait() as guard:
            images = normalize(padded(batch.images[:size], 8))
            kept = predict_batch(model, images, batch.labels[:size], batch.indices[:size])
    assert guard.num_copies == 0
    assert {(name, tensor.shape, tensor.device.type) for name, tensor in kept.items()} == {
        ("indices", (size,), kind),
        ("labels", (size,), kind),
        ("top_ids", (size, 5), kind),
        ("confidences", (size,), kind),
        ("losses", (size,), kind),
    }
