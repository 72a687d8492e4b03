"""Open the images that `--data` names; split one source into train and val."""

import hashlib
import shlex
from collections.abc import Iterable

import numpy as np

from resnet_in1k.data import builtin, hf_dataset, image_folder, layout, tar_shards
from resnet_in1k.data.dataset import SPLIT_NAMES, Source, SourceFacts, SourceType, Split, delete_caches
from resnet_in1k.data.image_folder import FileSource
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

SOURCES: dict[str, SourceType] = {
    "digits": builtin.Digits,
    "hf": hf_dataset,
    "shards": tar_shards,
    "synthetic": builtin.Synthetic,
}
"""Source types by the part of `--data` before a colon; any other value is a folder."""


def _source_type(data: str) -> SourceType:
    return SOURCES.get(data.partition(":")[0], image_folder)


def source_facts(data: str) -> SourceFacts:
    return _source_type(data).facts(data)


def open_source(data: str, split: Split, val_share: float = 0.0) -> Source:
    """Open one split of the value of `--data`; raises UserError if there is no such data, or its layout is wrong.

    Args:
        split: in any case; `validation` and `valid` are val, `training` is train.
        val_share: fraction that becomes val, see `split_by_hash`; 0 for data with a val split.
    """
    split = next((name for name, names in SPLIT_NAMES.items() if split.lower() in names), split)
    if split not in ("train", "val") and _source_type(data) in (builtin.Digits, builtin.Synthetic):
        raise UserError(f"--data {data} has no split {split}, but train and val")
    if not val_share or split not in ("train", "val"):
        return _source_type(data).open_split(data, split)
    return split_by_hash(open_whole(data), split, val_share)


def open_whole(data: str) -> Source:
    """Open all images of data without a val split; raises UserError if they have one."""
    if not hasattr(_source_type(data), "open_whole"):
        raise UserError(f"--val-share is for images without a val split; {data} has one")
    return _source_type(data).open_whole(data)


def split_by_hash(source: Source, split: Split, val_share: float) -> Source:
    """Return one split of `source`: val gets the images whose key has a hash below `val_share`.

    Adding an image leaves the others where they are, unless a class would be missing from a split.

    Raises:
        UserError: if classes have one image only.
    """
    hashes = (int.from_bytes(hashlib.sha256(source.keys[index]).digest()[:8], "big") for index in range(len(source)))
    fractions = np.fromiter(hashes, np.uint64, len(source)) / 2**64  # uniform in 0 … 1
    is_val = fractions < val_share
    counts = np.bincount(source.labels)
    if single := [source.class_names[label] for label in np.flatnonzero(counts == 1)]:
        raise UserError(f"--val-share: one image only of {shorten(single, 9)}; add images, or remove these classes")
    by_class = np.split(np.argsort(source.labels, kind="stable"), np.cumsum(counts)[:-1])
    for members in filter(len, by_class):
        if not is_val[members].any():
            is_val[members[fractions[members].argmin()]] = True
        elif is_val[members].all():
            is_val[members[fractions[members].argmax()]] = False
    return source.take(np.flatnonzero(is_val if split == "val" else ~is_val), split)


def open_train_and_val(data: str, val_share: float = 0.0, rescan: bool = False) -> tuple[Source, Source]:
    """Open both splits, as `open_source`; raises UserError if they do not have the same classes, or one class only.

    Args:
        rescan: delete cached listings and indexes, of all data, first.
    """
    if rescan:
        delete_caches()
    train, val = (open_source(data, split, val_share) for split in ("train", "val"))
    where = shlex.quote(str(train.folder)) if isinstance(train, FileSource) else ""
    advice = f", or divide the training images: --data {where} --val-share 0.2" if where else ""
    check_same_classes(train.class_names, "train", val.class_names, "val", data, advice)
    check_several_classes(train)
    return train, val


def check_several_classes(source: Source) -> None:
    """Raise UserError for a single class: any network would be right for all images."""
    if len(source.class_names) == 1:
        advice = f"; {layout.advice(source.folder)}" if isinstance(source, FileSource) else ""
        raise UserError(f"{source.name}: one class only, {source.class_names[0]}; at least two are needed{advice}")


def check_same_classes(
    a: Iterable[str], a_name: str, b: Iterable[str], b_name: str, where: str, advice: str = ""
) -> None:
    """Raise UserError with the classes that only one of the two has."""
    only_a, only_b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    if only_a or only_b:
        parts = [f"only in {name}: {shorten(only)}" for name, only in [(a_name, only_a), (b_name, only_b)] if only]
        differences = f"{'; '.join(parts)}; add or remove images of those classes{advice}"
        raise UserError(f"{where}: {a_name} and {b_name} must have the same classes, but {differences}")
    if list(a) != list(b):
        raise UserError(f"{where}: {a_name} and {b_name} have the same classes in another order; write one again")
