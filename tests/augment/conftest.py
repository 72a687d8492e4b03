"""What the tests of augmentation share."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def images(photographs: list[np.ndarray]) -> torch.Tensor:
    """(96, 3, 64, 64) uint8 pieces of real photographs."""
    pixels = torch.stack([torch.from_numpy(photograph) for photograph in photographs]).permute(0, 3, 1, 2)
    tiles = pixels[:, :, :384, :512].unfold(2, 64, 64).unfold(3, 64, 64)  # (2, 3, 6, 8, 64, 64)
    return tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 64, 64).contiguous()
