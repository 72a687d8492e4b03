"""Training of a network that is small enough to be trained many times."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.training import TINY, narrow_resnet18, run

from resnet_in1k.run_folder import RunFolder


@pytest.fixture
def narrow() -> Iterator[None]:
    """A test that trains in this process uses this, unless it compares with torchvision's own network."""
    with narrow_resnet18():
        yield


@pytest.fixture(scope="session")
def finished(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of this name in tests/conftest.py, of a narrow network."""
    with narrow_resnet18():
        output = tmp_path_factory.mktemp("narrow") / "finished"
        return run(TINY, image_folder, output, checkpoint_every=3, keep_checkpoints=9)
