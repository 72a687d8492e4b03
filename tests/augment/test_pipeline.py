from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as F

from resnet_in1k.augment import pipeline
from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.recipes.published import RECIPES

RECIPE = replace(RECIPES["tutorial"].recipe, global_batch_size=24, seed=3)
NUM_CLASSES = 24
TARGETS = torch.arange(24)
"""Each image has a class of its own."""


@pytest.fixture(scope="module")
def images(images: torch.Tensor) -> torch.Tensor:
    """(24, 3, 64, 64) uint8 of both photographs."""
    return images[::4].contiguous()


def columns_of(augmentation: Augmentation, step: int) -> dict[str, torch.Tensor]:
    """The draws of a step by operation, (B, k)."""
    draws = augmentation.draw(step)
    names = [operation.name for operation in augmentation.operations]
    return dict(zip(names, draws.per_image.split(draws.widths, dim=1), strict=True))


def test_all_operations_are_torchvisions_one_after_the_other(images: torch.Tensor):
    """Each image through torchvision's functionals, rounding to integer levels after each."""
    augmentation = Augmentation(RECIPE, NUM_CLASSES)
    ours, targets = augmentation(images, TARGETS, step=1)
    assert torch.equal(targets, TARGETS)
    columns, (_, _, order) = columns_of(augmentation, 1), augmentation.draw(1).shared
    factors = dict(zip(("brightness", "contrast", "saturation", "hue"), columns["color_jitter"].T, strict=True))
    differences = []
    for i, image in enumerate(images):
        expected = F.hflip(image) if columns["horizontal_flip"][i] else image
        expected = F.rotate(expected, float(columns["rotation"][i]))
        for name in order:
            expected = getattr(F, f"adjust_{name}")(expected, float(factors[name][i]))
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
    again = Augmentation(RECIPE, NUM_CLASSES).draw(step=4)
    assert torch.equal(again.per_image, first.per_image)
    assert again.shared == first.shared
    for recipe, step in ((RECIPE, 5), (replace(RECIPE, seed=4), 4)):
        other = Augmentation(recipe, NUM_CLASSES).draw(step).per_image
        assert not any(torch.equal(ours, theirs) for ours, theirs in zip(other.T, first.per_image.T, strict=True))


@pytest.mark.parametrize("off", ["hflip_probability", "rotation_degrees"])
def test_switching_an_operation_off_leaves_the_draws_of_the_others(off: str):
    everything = columns_of(Augmentation(RECIPE, NUM_CLASSES), 1)
    fewer = columns_of(Augmentation(replace(RECIPE, **{off: 0.0}), NUM_CLASSES), 1)
    assert len(fewer) == 2
    assert all(torch.equal(columns, everything[name]) for name, columns in fewer.items())


def test_recipe_without_augmentation_normalizes_only(images: torch.Tensor):
    off = dict.fromkeys(["hflip_probability", "rotation_degrees", "brightness", "contrast", "saturation", "hue"], 0)
    augmentation = Augmentation(replace(RECIPE, **off), NUM_CLASSES)
    assert augmentation.operations == []
    assert torch.equal(augmentation(images, TARGETS, step=1)[0], normalize(images))


@pytest.mark.parametrize("num_images", [24, 5])
def test_batch_is_augmented_by_the_draws_of_its_step(images: torch.Tensor, num_images: int):
    """In the preflight a batch may be smaller than this process's share."""
    augmentation = Augmentation(RECIPE, NUM_CLASSES, rank=0, num_processes=1)
    pixels, targets = augmentation(images[:num_images], TARGETS[:num_images], step=7)
    complete, _ = augmentation.apply(images, TARGETS, augmentation.draw(7))
    torch.testing.assert_close(pixels, complete[:num_images], atol=1e-5, rtol=0)
    assert torch.equal(targets, TARGETS[:num_images])
    assert pixels.is_contiguous(memory_format=torch.channels_last)


class MixNeighbors:
    """Averages the neighbors of a batch, each pair with a weight that is drawn for it: targets are probabilities."""

    name = "mix_neighbors"
    works_on_uint8 = False

    def __init__(self, num_classes: int):
        self._num_classes = num_classes

    def draw(self, generator: torch.Generator, batch_size: int) -> tuple[torch.Tensor, None]:
        return torch.rand(batch_size // 2, 1, generator=generator).repeat_interleave(2, dim=0), None

    def apply(
        self, images: torch.Tensor, targets: torch.Tensor, draws: torch.Tensor, shared: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        neighbor = torch.arange(len(images)) ^ 1
        dense = torch.nn.functional.one_hot(targets, self._num_classes).float()
        return images.lerp(images[neighbor], draws.view(-1, 1, 1, 1)), dense.lerp(dense[neighbor], draws)


@pytest.fixture(params=[0, 3], ids=["first", "last"])
def with_new_operation(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Its position in the pipeline."""
    operations = list(pipeline.OPERATIONS)
    operations.insert(request.param, lambda recipe, num_classes: MixNeighbors(num_classes))
    monkeypatch.setattr(pipeline, "OPERATIONS", operations)
    return request.param


def test_new_operation_leaves_the_draws_of_the_others(with_new_operation: int, monkeypatch: pytest.MonkeyPatch):
    drawn = columns_of(Augmentation(RECIPE, NUM_CLASSES), 2)
    assert list(drawn)[with_new_operation] == "mix_neighbors"
    monkeypatch.undo()
    before = columns_of(Augmentation(RECIPE, NUM_CLASSES), 2)
    assert all(torch.equal(columns, drawn[name]) for name, columns in before.items())


def test_two_names_draw_independently(monkeypatch: pytest.MonkeyPatch):
    def named(name: str) -> MixNeighbors:
        operation = MixNeighbors(NUM_CLASSES)
        operation.name = name
        return operation

    monkeypatch.setattr(pipeline, "OPERATIONS", [lambda *_: named("one"), lambda *_: named("two")])
    one, two = columns_of(Augmentation(RECIPE, NUM_CLASSES), 2).values()
    assert not torch.equal(one, two)


def test_new_operation_may_return_dense_targets(images: torch.Tensor, with_new_operation: int):
    """By hand, from the drawn weights: image 10 is mixed with image 11 and the targets in the same shares."""
    augmentation = Augmentation(replace(RECIPE, hflip_probability=0, rotation_degrees=0), NUM_CLASSES)
    _, targets = augmentation(images, TARGETS, step=2)
    weight = columns_of(augmentation, 2)["mix_neighbors"][10].item()
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
        parts.append(augmentation(images[rows], TARGETS[rows], step=2))
    monkeypatch.setattr(pipeline, "CHUNK_IMAGES", {"cpu": 24})
    augmentation = Augmentation(RECIPE, NUM_CLASSES)
    pixels, targets = augmentation(images, TARGETS, step=2)
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), pixels, atol=1e-4, rtol=0)
    assert torch.equal(torch.cat([part for _, part in parts]), targets)
