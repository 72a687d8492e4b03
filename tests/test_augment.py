from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms import Normalize

from resnet_in1k import augment as A
from resnet_in1k.recipes import TUTORIAL

RECIPE = replace(TUTORIAL, global_batch_size=96, seed=3)


@pytest.fixture(scope="module")
def images(photographs) -> torch.Tensor:
    """(96, 3, 64, 64) uint8 pieces of real photographs."""
    pixels = torch.stack([torch.from_numpy(photograph) for photograph in photographs]).permute(0, 3, 1, 2)
    tiles = pixels[:, :, :384, :512].unfold(2, 64, 64).unfold(3, 64, 64)  # (2, 3, 6, 8, 64, 64)
    return tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 64, 64).contiguous()


@pytest.mark.parametrize("name", A.COLOUR_OPERATIONS)
def test_each_colour_operation_is_torchvisions_within_one_level(images: torch.Tensor, name: str):
    low, high = (-0.5, 0.5) if name == "hue" else (0.0, 2.0)
    parameters = torch.empty(len(images)).uniform_(low, high, generator=torch.Generator().manual_seed(1))
    ours = A.ADJUST[name](images.float(), parameters)
    theirs = torch.stack([getattr(F, f"adjust_{name}")(i, float(p)) for i, p in zip(images, parameters, strict=True)])
    assert (ours - theirs).abs().max() <= 1 + 1e-3


def test_rotation_is_torchvisions_but_for_ties_between_two_pixels(images: torch.Tensor):
    degrees = torch.empty(len(images)).uniform_(-180, 180, generator=torch.Generator().manual_seed(1))
    ours = A.rotate(images.float(), degrees)
    theirs = torch.stack([F.rotate(i, float(d)) for i, d in zip(images, degrees, strict=True)])
    assert (ours != theirs).any(dim=1).float().mean() < 1e-4  # where the nearest pixel is a matter of rounding


def test_hflip_is_torchvisions(images: torch.Tensor):
    mirrored = torch.arange(len(images)) % 3 == 0
    ours = A.hflip(images.float(), mirrored)
    theirs = torch.stack([F.hflip(i) if m else i for i, m in zip(images, mirrored, strict=True)])
    assert torch.equal(ours, theirs.float())


def test_normalise_is_torchvisions(images: torch.Tensor):
    ours = A.normalise(images)
    theirs = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))(images.float() / 255)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_the_whole_is_torchvisions_operations_one_after_the_other(images: torch.Tensor):
    """Each image through torchvision's functionals, in its own order, rounding to whole levels after each."""
    draws = A.draw(RECIPE, step=1)
    ours = A.augment(images, draws)
    differences = []
    for i, image in enumerate(images):
        expected = F.hflip(image) if draws.hflip[i] else image
        expected = F.rotate(expected, float(draws.degrees[i]))
        for operation in draws.order[i].tolist():
            name = A.COLOUR_OPERATIONS[operation]
            expected = getattr(F, f"adjust_{name}")(expected, float(draws.factors[name][i]))
        differences.append((ours[i] - A.normalise(expected[None])[0]).abs().mean().item())
    # A level is about 1/58 after normalising; torchvision loses up to one in each of its four roundings.
    assert max(differences) < 3 / 58


def test_draws_of_the_tutorial_lie_where_torchvision_draws_them():
    draws = A.draw(replace(TUTORIAL, global_batch_size=20_000), step=9)
    assert 0.48 < draws.hflip.float().mean() < 0.52
    for values, low, high in [
        (draws.degrees, -10, 10),
        *((draws.factors[name], 0.8, 1.2) for name in ("brightness", "contrast", "saturation")),
        (draws.factors["hue"], -0.2, 0.2),
    ]:
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
    orders, counts = draws.order.unique(dim=0, return_counts=True)
    assert len(orders) == 24  # every order of four
    assert counts.min() > 20_000 / 24 * 0.8


def test_draws_depend_on_seed_and_step_alone(images: torch.Tensor):
    first = A.draw(RECIPE, step=4)
    torch.rand(10)
    assert torch.equal(A.draw(RECIPE, step=4).degrees, first.degrees)
    assert not torch.equal(A.draw(RECIPE, step=5).degrees, first.degrees)
    assert not torch.equal(A.draw(replace(RECIPE, seed=4), step=4).degrees, first.degrees)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_a_processes_slice_is_augmented_as_in_the_whole(images: torch.Tensor, num_processes: int):
    draws = A.draw(RECIPE, step=2)
    size = len(images) // num_processes
    slices = [slice(rank * size, (rank + 1) * size) for rank in range(num_processes)]
    parts = torch.cat([A.augment(images[rows], draws[rows]) for rows in slices])
    torch.testing.assert_close(parts, A.augment(images, draws), atol=1e-5, rtol=0)


def test_switching_one_operation_off_leaves_the_others():
    with_hue, without = A.draw(RECIPE, 1), A.draw(replace(RECIPE, hue=0), 1)
    assert "hue" not in without.factors
    assert torch.equal(with_hue.factors["contrast"], without.factors["contrast"])
    assert torch.equal(with_hue.order, without.order)


def test_nothing_in_use_leaves_the_image(images: torch.Tensor):
    plain = dict.fromkeys(["hflip_probability", "rotation_degrees", "brightness", "contrast", "saturation", "hue"], 0)
    assert torch.equal(A.augment(images, A.draw(replace(RECIPE, **plain), 1)), A.normalise(images))
