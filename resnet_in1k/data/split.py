"""A val split of images that have none: by the hashes of their names, so the same on any machine and in every run."""

import hashlib

import numpy as np

from resnet_in1k.data.dataset import Divisible, Source, Split
from resnet_in1k.utils.errors import UserError


def split_by_hash(whole: Divisible, split: Split, val_share: float) -> Source:
    """The images of `whole` whose names' hashes are in the val share, or the others.

    An image that is added moves no other; only that each class has at least one image in either split.

    Raises:
        UserError: if a class has one image only.
    """
    places = np.array([_place_of(whole.key(index)) for index in range(len(whole))])
    is_val = places < val_share
    by_class = np.argsort(whole.labels, kind="stable")
    ends = np.cumsum(np.bincount(whole.labels, minlength=len(whole.class_names)))
    for name, members in zip(whole.class_names, np.split(by_class, ends[:-1]), strict=True):
        if len(members) == 1:
            image = whole.image_name(int(members[0]))
            raise UserError(
                f"--val-share {val_share:g}: class {name} has one image, {image}, which cannot be in both splits; "
                "add some, or remove it"
            )
        if len(members) and not is_val[members].any():
            is_val[members[places[members].argmin()]] = True
        elif len(members) and is_val[members].all():
            is_val[members[places[members].argmax()]] = False
    (chosen,) = np.nonzero(is_val if split == "val" else ~is_val)
    return whole.take(chosen, split)


def _place_of(key: bytes) -> float:
    """From 0 to 1."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
