import torch
from torchvision.transforms import Normalize

from resnet_in1k.augment.normalize import normalize


def test_normalize_is_torchvisions(images: torch.Tensor):
    theirs = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))(images.float() / 255)
    for ours in (normalize(images), normalize(images.float())):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        assert ours.dtype == torch.float32
        assert ours.is_contiguous(memory_format=torch.channels_last)
