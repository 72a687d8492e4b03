import functools
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch._dynamo.testing import CompileCounter

from resnet_in1k.augment import pipeline
from resnet_in1k.augment.color_jitter import ADJUSTMENTS
from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.operation import Draws
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.data.loader import Batch
from resnet_in1k.recipes.published import RECIPES

RECIPE = replace(RECIPES["tutorial"].recipe, global_batch_size=24, seed=3)
NUM_CLASSES = 24
TARGETS = torch.arange(24)
"""Each image has a class of its own."""


@pytest.fixture(scope="module")
def images(images: torch.Tensor) -> torch.Tensor:
    """(24, 3, 64, 64) uint8 of both photographs."""
    return images[::4].contiguous()


def assert_same_draws(ours: list[Draws], theirs: list[Draws]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_all_operations_are_torchvisions_one_after_the_other(images: torch.Tensor):
    """Each image through torchvision's functionals, in its own order, rounding to whole levels after each."""
    augmentation = Augmentation(RECIPE, NUM_CLASSES)
    drawn = augmentation.draw(step=1)
    flip, rotation, jitter = drawn
    ours, targets = augmentation.apply(images, TARGETS, drawn)
    assert torch.equal(targets, TARGETS)
    names, differences = list(ADJUSTMENTS), []
    for i, image in enumerate(images):
        expected = F.hflip(image) if flip["mirrored"][i] else image
        expected = F.rotate(expected, float(rotation["degrees"][i]))
        for number in jitter["order"][i].tolist():
            expected = getattr(F, f"adjust_{names[number]}")(expected, float(jitter[names[number]][i]))
        differences.append((ours[i] - normalize(expected[None])[0]).abs().mean().item())
    # A level is about 1/58 after normalizing; torchvision loses up to one in each of its four roundings.
    assert max(differences) < 3 / 58


def test_operations_have_the_numbers_of_the_recipe():
    flip, rotation, jitter = Augmentation(
        replace(RECIPE, hflip_probability=0.3, brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4), NUM_CLASSES
    ).operations
    assert (flip.probability, rotation.max_degrees) == (0.3, 10)
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.1, 0.2, 0.3, 0.4)


def test_draws_depend_on_seed_and_step_alone():
    first = Augmentation(RECIPE, NUM_CLASSES).draw(step=4)
    torch.rand(10)
    assert_same_draws(Augmentation(RECIPE, NUM_CLASSES).draw(step=4), first)
    for other in (
        Augmentation(RECIPE, NUM_CLASSES).draw(step=5),
        Augmentation(replace(RECIPE, seed=4), NUM_CLASSES).draw(step=4),
    ):
        for ours, theirs in zip(other, first, strict=True):
            assert not any(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("off", ["hflip_probability", "rotation_degrees"])
def test_switching_an_operation_off_leaves_the_draws_of_the_others(off: str):
    everything, fewer = Augmentation(RECIPE, NUM_CLASSES), Augmentation(replace(RECIPE, **{off: 0.0}), NUM_CLASSES)
    names = [operation.name for operation in fewer.operations]
    assert len(names) == 2
    kept = [
        draws
        for operation, draws in zip(everything.operations, everything.draw(1), strict=True)
        if operation.name in names
    ]
    assert_same_draws(fewer.draw(1), kept)


def test_recipe_without_augmentation_normalizes_only(images: torch.Tensor):
    off = dict.fromkeys(["hflip_probability", "rotation_degrees", "brightness", "contrast", "saturation", "hue"], 0)
    augmentation = Augmentation(replace(RECIPE, **off), NUM_CLASSES)
    assert augmentation.operations == []
    assert torch.equal(augmentation.apply(images, TARGETS, [])[0], normalize(images))


@pytest.mark.parametrize("num_images", [24, 5])
def test_batch_is_augmented_by_the_draws_of_its_step(images: torch.Tensor, num_images: int):
    """In the preflight a batch may be smaller than this process's share."""
    augmentation = Augmentation(RECIPE, NUM_CLASSES, rank=0, num_processes=1)
    some = slice(num_images)
    prepared, targets = augmentation.prepare(Batch(images[some], TARGETS[some], TARGETS[some], step=7))
    whole, _ = augmentation.apply(images, TARGETS, augmentation.draw(7))
    torch.testing.assert_close(prepared, whole[some], atol=1e-5, rtol=0)
    assert torch.equal(targets, TARGETS[some])
    assert prepared.is_contiguous(memory_format=torch.channels_last)


def test_compiled_operations_are_one_graph_for_all_draws(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """As on a device: compiled, they give what they give uncompiled, and are not compiled again for other draws."""
    counter = CompileCounter()
    monkeypatch.setattr(pipeline, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    compiled, plain = Augmentation(RECIPE, NUM_CLASSES, compile=True), Augmentation(RECIPE, NUM_CLASSES)
    for step in (1, 2, 3):
        drawn = plain.draw(step)
        ours, _ = compiled.apply_arranged(images, TARGETS, drawn)
        torch.testing.assert_close(ours, plain.apply(images, TARGETS, drawn)[0], atol=1e-4, rtol=0)
    assert counter.frame_count == 1


class MixNeighbors:
    """Averages the neighbors of a batch, each pair with a weight that is drawn for it: targets are probabilities."""

    name = "mix_neighbors"

    def __init__(self, num_classes: int):
        self._num_classes = num_classes

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        return {"weight": torch.rand(batch_size // 2, generator=generator).repeat_interleave(2)}

    def apply(self, images: torch.Tensor, targets: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        neighbor, weight = torch.arange(len(images)) ^ 1, draws["weight"]
        dense = torch.nn.functional.one_hot(targets, self._num_classes).float()
        return (
            images.lerp(images[neighbor], weight.view(-1, 1, 1, 1)),
            dense.lerp(dense[neighbor], weight.view(-1, 1)),
        )


@pytest.fixture(params=[0, 3], ids=["first", "last"])
def with_new_operation(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Its position in the pipeline."""
    operations = list(pipeline.OPERATIONS)
    operations.insert(request.param, lambda recipe, num_classes: MixNeighbors(num_classes))
    monkeypatch.setattr(pipeline, "OPERATIONS", operations)
    return request.param


def test_new_operation_leaves_the_draws_of_the_others(with_new_operation: int, monkeypatch: pytest.MonkeyPatch):
    drawn = Augmentation(RECIPE, NUM_CLASSES).draw(step=2)
    new = drawn.pop(with_new_operation)
    assert new.keys() == {"weight"}
    monkeypatch.undo()
    assert_same_draws(drawn, Augmentation(RECIPE, NUM_CLASSES).draw(step=2))


def test_two_names_draw_independently(monkeypatch: pytest.MonkeyPatch):
    def named(name: str) -> MixNeighbors:
        operation = MixNeighbors(NUM_CLASSES)
        operation.name = name
        return operation

    monkeypatch.setattr(pipeline, "OPERATIONS", [lambda *_: named("one"), lambda *_: named("two")])
    one, two = Augmentation(RECIPE, NUM_CLASSES).draw(step=2)
    assert not torch.equal(one["weight"], two["weight"])


def test_new_operation_may_return_dense_targets(images: torch.Tensor, with_new_operation: int):
    """By hand, from the drawn weights: image 10 is mixed with image 11 and the targets in the same shares."""
    augmentation = Augmentation(replace(RECIPE, hflip_probability=0, rotation_degrees=0), NUM_CLASSES)
    drawn = augmentation.draw(step=2)
    _, targets = augmentation.apply(images, TARGETS, drawn)
    weight = next(draws["weight"][10] for draws in drawn if "weight" in draws)
    assert targets.shape == (24, NUM_CLASSES)
    assert (targets[10, 10], targets[10, 11]) == (pytest.approx(1 - weight), pytest.approx(weight))
    assert (targets[11, 10], targets[11, 11]) == (pytest.approx(weight), pytest.approx(1 - weight))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(24))


@pytest.mark.parametrize("num_processes", [2, 3])
def test_parts_of_a_batch_are_augmented_as_in_the_whole(
    images: torch.Tensor, with_new_operation: int, monkeypatch: pytest.MonkeyPatch, num_processes: int
):
    """Each process its share, on a CPU a few images at a time; against the whole batch at once."""
    size = 24 // num_processes
    parts = []
    for rank in range(num_processes):
        augmentation, rows = (
            Augmentation(RECIPE, NUM_CLASSES, rank, num_processes),
            slice(rank * size, (rank + 1) * size),
        )
        parts.append(augmentation.apply(images[rows], TARGETS[rows], augmentation.draw(step=2)))
    monkeypatch.setattr(pipeline, "CPU_CHUNK", 24)
    augmentation = Augmentation(RECIPE, NUM_CLASSES)
    pixels, targets = augmentation.apply(images, TARGETS, augmentation.draw(step=2))
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), pixels, atol=1e-4, rtol=0)
    assert torch.equal(torch.cat([part for _, part in parts]), targets)
