"""What the tests of sources and loaders share."""

from pathlib import Path

import pytest

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import open_source


@pytest.fixture
def source(image_folder: Path) -> Source:
    """37 photographs in six classes."""
    return open_source(str(image_folder), "train")
