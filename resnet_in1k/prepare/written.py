"""What is written of each image, and about how much of all."""

import functools
from collections.abc import Callable

import numpy as np

from resnet_in1k.core import files
from resnet_in1k.core.errors import UserError
from resnet_in1k.data.source import Source

Change = Callable[[bytes], bytes]
"""Of an encoded image, such as resizing; raises ValueError if it cannot be decoded."""


def written_bytes(source: Source, index: int, change: Change | None) -> bytes:
    """Raises UserError if the image cannot be read, or not be decoded where it is changed."""
    name = source.image_name(index)
    try:
        data = files.retry_once(functools.partial(source.read, index)).tobytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    try:
        return change(data) if change else data
    except ValueError as error:
        raise UserError(f"{name} cannot be decoded ({error}); prepare_data.py --verify lists all such images") from None


def mean_written_bytes(source: Source, change: Change | None, num_measured: int) -> float:
    """Of so many images, spread evenly over the source; raises UserError as `written_bytes`."""
    places = np.unique(np.linspace(0, len(source) - 1, num=min(num_measured, len(source)), dtype=np.int64))
    return float(np.mean([len(written_bytes(source, index, change)) for index in places.tolist()]))
