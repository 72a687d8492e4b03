"""What is done about an image that cannot be read: fail, replace it by the next one, or count it as wrong."""

import functools
from collections.abc import Collection
from typing import Literal

import torch

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import decode
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import BadImageError, ProcessError

OnBadImage = Literal["fail", "skip"]
"""What training does about an image that cannot be read."""
IfBad = Literal["fail", "replace", "blank", "blank_on_any_error"]
"""`replace`: by the next image of the source that can be decoded; `blank`: by zeros, to be counted as wrong. All fail
for a file that cannot be read from its disk, except the last, which is for prediction."""


def read_image(
    source: Source, index: int, if_bad: IfBad, bad_images: dict[int, str]
) -> tuple[int, torch.Tensor | None]:
    """The image at `index` or, to replace it, the next that can be decoded, with its index; None for a blank one.

    The result depends on the files alone, so it is the same in every epoch, process and resumed run. Each image that
    cannot be decoded is added to `bad_images`, with the decoder's reason.

    Raises:
        ProcessError: if the storage fails, or too many images in a row would be replaced.
        BadImageError: for an image that cannot be decoded, if `if_bad` is "fail".
    """
    at_most = max_bad_images(len(source)) if if_bad == "replace" else 0
    for candidate in range(index, index + at_most + 1):
        candidate %= len(source)
        try:
            return candidate, decode(files.retry_once(functools.partial(source.read, candidate)))
        except OSError as error:  # of the storage, not the image: it may be gone in the next epoch
            if if_bad == "blank_on_any_error":
                bad_images[candidate] = error.strerror or str(error)
                return index, None
            name = source.image_name(candidate)
            raise ProcessError(f"{name} cannot be read from its disk: {error.strerror or error}") from None
        except ValueError as error:
            bad_images[candidate] = str(error)
    if if_bad == "fail":
        raise BadImageError.about(source.image_name(index), bad_images[index])
    if if_bad == "replace":
        raise ProcessError(too_many_bad_images(bad_images, source))
    return index, None


def max_bad_images(num_images: int) -> int:
    """How many of so many training images may be replaced: 0.1 %."""
    return num_images // 1000


def too_many_bad_images(bad_images: Collection[int], source: Source) -> str:
    first = source.image_name(min(bad_images))
    return (
        f"{len(bad_images)} of {len(source):,} training images cannot be read ({first}, …), more than the 0.1 % that "
        "--on-bad-image skip replaces; repair or remove them"
    )
