"""Archives as ImageNet's, small."""

from pathlib import Path

import numpy as np
import pytest
from helpers.archives import Archives, write_archives
from helpers.images import encoded
from PIL import Image


@pytest.fixture(scope="session")
def images(photographs: list[np.ndarray]) -> list[bytes]:
    """18 photographs of 300 × 200 and 90 × 120 pixels in turn."""
    pictures = []
    for number in range(18):
        height, width = [(200, 300), (120, 90)][number % 2]
        crop = photographs[number % 2][number : number + height, 2 * number : 2 * number + width]
        pictures.append(encoded(Image.fromarray(crop), format="JPEG", quality=90).tobytes())
    return pictures


@pytest.fixture
def archives(images: list[bytes], tmp_path: Path) -> tuple[Archives, dict[str, bytes]]:
    return write_archives(tmp_path / "archives", images)
