"""All operations of a recipe on one batch."""

from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as F

from resnet_in1k.augment import pipeline
from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.recipes.published import RECIPES

RECIPE = replace(RECIPES["tutorial"].recipe, global_batch_size=24, seed=3)
EVERYTHING = replace(RECIPE, random_erasing_probability=0.5, mixup_alpha=0.4, cutmix_alpha=1.0, mix_by_pair=True)
NUM_CLASSES = 24
TARGETS = torch.arange(24)
"""Each image has a class of its own."""


@pytest.fixture(scope="module")
def images(images: torch.Tensor) -> torch.Tensor:
    """(24, 3, 64, 64) uint8 of both photographs."""
    return images[::4].contiguous()


def test_all_operations_are_torchvisions_one_after_the_other(images: torch.Tensor):
    """Each image through torchvision's functionals, rounding to integer levels after each."""
    augmentation = Augmentation(RECIPE, NUM_CLASSES)
    ours, targets = augmentation(images, TARGETS, step=1)
    assert torch.equal(targets, TARGETS)
    draws, differences = augmentation.draw(1), []
    for i, image in enumerate(images):
        expected = F.hflip(image) if draws["is_mirrored"][i] else image
        expected = F.rotate(expected, float(draws["degrees"][i]))
        for name in list(draws)[2:]:
            expected = getattr(F, f"adjust_{name}")(expected, float(draws[name][i]))
        differences.append((ours[i] - normalize(expected[None])[0]).abs().mean().item())
    # A level is about 1/58 after normalizing; torchvision loses up to one in each of its four roundings.
    assert max(differences) < 3 / 58


def assert_equal_draws(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same in the same order, which is that of the color adjustments."""
    assert list(ours) == list(theirs)
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())


def test_draws_depend_on_seed_and_step_alone():
    first = Augmentation(RECIPE, NUM_CLASSES).draw(step=4)
    torch.rand(10)
    assert_equal_draws(Augmentation(RECIPE, NUM_CLASSES).draw(step=4), first)
    for recipe, step in ((RECIPE, 5), (replace(RECIPE, seed=4), 4)):
        other = Augmentation(recipe, NUM_CLASSES).draw(step)
        assert not any(torch.equal(values, first[name]) for name, values in other.items())


def test_operations_draw_independently():
    """From the same uniform numbers, an image would be mirrored whenever it turns clockwise."""
    draws = Augmentation(RECIPE, NUM_CLASSES).draw(1)
    assert 4 < ((draws["is_mirrored"] == 1) == (draws["degrees"] < 0)).sum() < 20


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ("hflip_probability", "is_mirrored"),
        ("rotation_degrees", "degrees"),
        ("hue", "hue"),
        ("random_erasing_probability", "erased_sides erased_corner"),
        ("mixup_alpha cutmix_alpha", "is_cutmix mixing_weight cutmix_center"),
    ],
)
def test_switching_an_operation_off_leaves_the_draws_of_the_others(fields: str, names: str):
    everything = Augmentation(EVERYTHING, NUM_CLASSES).draw(1)
    fewer = Augmentation(replace(EVERYTHING, **dict.fromkeys(fields.split(), 0.0)), NUM_CLASSES).draw(1)
    assert_equal_draws(fewer, {name: values for name, values in everything.items() if name not in names.split()})


def test_recipe_without_augmentation_normalizes_only_as_torchvision_does(images: torch.Tensor):
    off = dict.fromkeys(["hflip_probability", "rotation_degrees", "brightness", "contrast", "saturation", "hue"], 0)
    augmentation = Augmentation(replace(RECIPE, **off), NUM_CLASSES)
    ours, _ = augmentation(images, TARGETS, step=1)
    theirs = F.normalize(images.float() / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("num_processes", [2, 3, 6])
def test_parts_of_a_batch_are_augmented_as_in_the_whole(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, num_processes: int
):
    """Each process its share, a few images at a time, the same pairs mixed."""
    parts = []
    for rank, rows in enumerate(torch.arange(24).chunk(num_processes)):
        augmentation = Augmentation(EVERYTHING, NUM_CLASSES, rank, num_processes)
        parts.append(augmentation(images[rows], TARGETS[rows], step=2))
    monkeypatch.setattr(pipeline, "CPU_CHUNK_IMAGES", 24)
    whole = Augmentation(EVERYTHING, NUM_CLASSES)(images, TARGETS, step=2)
    for of_parts, of_whole in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(of_parts), of_whole, atol=1e-4, rtol=0)
    smaller, _ = Augmentation(EVERYTHING, NUM_CLASSES)(images[:6], TARGETS[:6], step=2)  # as in the preflight
    torch.testing.assert_close(smaller, whole[0][:6], atol=1e-4, rtol=0)
