"""What is written of each image, and about how much of all."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_in1k.data.dataset import Source, spread_over
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError

SAMPLED_IMAGES = 100
"""Whose content must be the same when a writing goes on."""
Change = Callable[[bytes], bytes]
"""Of an encoded image, such as resizing; raises ValueError if it cannot be decoded."""


class Written(NamedTuple):
    """What a process has done."""

    num_images: int
    undecodable: list[str]
    """A line for each image that could not be changed, and was copied as it is."""


def written_bytes(source: Source, index: int, change: Change | None, undecodable: list[str]) -> bytes:
    """An image that cannot be decoded stays as it is: whether to skip it is for training to decide, and to stop here
    would cost the hours before. Raises UserError if it cannot be read."""
    name = source.image_name(index)
    try:
        data = files.retry_once(functools.partial(source.read, index)).tobytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    try:
        return change(data) if change else data
    except ValueError as error:
        undecodable.append(f"{name} cannot be decoded ({error}), and is copied as it is")
        return data


def mean_written_bytes(source: Source, change: Change | None, num_measured: int) -> float:
    """Of so many images, spread evenly over the source; raises UserError as `written_bytes`."""
    return float(
        np.mean([len(written_bytes(source, index, change, [])) for index in spread_over(source, num_measured)])
    )


def content_sha256(source: Source) -> str:
    """What an interrupted writing goes on by: which images there are and, of some, their content, as copies of another
    size have the same names. Raises UserError as `written_bytes`."""
    digest = hashlib.sha256(source.fingerprint().encode())
    for index in spread_over(source, SAMPLED_IMAGES):
        digest.update(hashlib.sha256(written_bytes(source, index, None, [])).digest())
    return digest.hexdigest()


def check_is_ours(folder: Path, plan_name: str, plan: dict[str, Any], otherwise: str) -> None:
    """Raises UserError if the folder has something else in it than what a run with the same plan has written."""
    kept = files.read_json_object(folder / plan_name)
    if kept is not None and kept != plan:
        raise UserError(f"{folder} {otherwise}; choose another folder, or remove it")
    # A hidden file is what a killed run leaves that was just writing its plan.
    if kept is None and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty, and was not written by this command; choose another folder")
