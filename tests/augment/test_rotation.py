import pytest
import torch
import torchvision.transforms.v2.functional as F

from resnet_in1k.augment.rotation import Rotation, rotate


def test_rotation_is_torchvisions_but_for_ties_between_two_pixels(images: torch.Tensor):
    degrees = torch.empty(len(images)).uniform_(-180, 180, generator=torch.Generator().manual_seed(1))
    ours, targets = Rotation(180).apply(images.float(), torch.arange(96), {"degrees": degrees})
    theirs = torch.stack([F.rotate(i, float(d)) for i, d in zip(images, degrees, strict=True)])
    assert (ours != theirs).any(dim=1).float().mean() < 1e-4  # where the nearest pixel is a matter of rounding
    assert torch.equal(targets, torch.arange(96))


@pytest.mark.parametrize("size", [7, 8])
def test_quarter_turn_is_exact(size: int):
    pixels = torch.arange(3 * size * size, dtype=torch.float32).view(1, 3, size, size)
    assert torch.equal(rotate(pixels, torch.tensor([90.0])), pixels.rot90(1, (2, 3)))  # counter-clockwise


def test_angles_are_uniform_to_either_side():
    degrees = Rotation(10).draw(torch.Generator().manual_seed(0), 20_000)["degrees"]
    assert -10 <= degrees.min() < -9.9
    assert 9.9 < degrees.max() <= 10
    assert abs(degrees.mean()) < 0.2
    assert abs(degrees.std() - 20 / 12**0.5) < 0.1
