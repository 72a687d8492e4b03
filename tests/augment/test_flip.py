import torch
import torchvision.transforms.v2.functional as F

from resnet_in1k.augment.flip import HorizontalFlip, hflip


def test_flip_is_torchvisions(images: torch.Tensor):
    mirrored = torch.arange(len(images)) % 3 == 0
    expected = torch.stack([F.hflip(i) if m else i for i, m in zip(images, mirrored, strict=True)]).float()
    assert torch.equal(hflip(images.float(), mirrored), expected)
    flipped, targets = HorizontalFlip(0.5).apply(images.float(), torch.arange(96), {"mirrored": mirrored})
    assert torch.equal(flipped, expected)
    assert torch.equal(targets, torch.arange(96))


def test_share_of_mirrored_images_is_the_probability():
    for probability in (0.1, 0.5, 1.0):
        draws = HorizontalFlip(probability).draw(torch.Generator().manual_seed(0), 20_000)
        assert abs(draws["mirrored"].float().mean() - probability) < 0.02
