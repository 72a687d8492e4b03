"""Where images come from: one module per kind of source, and the registry that `--data` is looked up in."""

from collections.abc import Iterable

from resnet_in1k.data import digits, synthetic
from resnet_in1k.data import hf_dataset as hf
from resnet_in1k.data import image_folder as folder
from resnet_in1k.data import tar_shards as shards
from resnet_in1k.data.dataset import Divisible, Source, SourceFacts, SourceType, Split, split_by_hash
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import shorten

SOURCES: dict[str, SourceType] = {"digits": digits, "hf": hf, "shards": shards, "synthetic": synthetic}
"""By the part of `--data` before a colon; anything else is a folder."""


def open_source(data: str, split: Split, val_share: float = 0.0) -> Source:
    """One split of what `--data` names.

    Args:
        val_share: of images without a val split, the share that is one; see `split_by_hash`.

    Raises:
        UserError: if there is no such data, or it is not laid out as images by class.
    """
    if not val_share:
        return _source_type(data).open_split(data, split)
    return split_by_hash(open_whole(data), split, val_share)


def open_whole(data: str) -> Divisible:
    """All images of data without a val split; raises UserError if they have one."""
    source_type = _source_type(data)
    if not hasattr(source_type, "open_whole"):
        raise UserError(f"--val-share is for images without a val split; {data} has one")
    return source_type.open_whole(data)


def source_facts(data: str) -> SourceFacts:
    """What a model card says of what `--data` named; the data need not be there."""
    return _source_type(data).facts(data)


def open_train_and_val(data: str, val_share: float = 0.0, rescan: bool = False) -> tuple[Source, Source]:
    """Both splits, with the same classes.

    Args:
        rescan: list folders and index shards anew, also where what is kept of them seems to hold.

    Raises:
        UserError: as `open_source`, and if the two splits do not have the same classes.
    """
    if rescan and (forget := getattr(_source_type(data), "forget", None)):
        forget(data)
    train, val = (open_source(data, split, val_share) for split in ("train", "val"))
    check_same_classes(train.class_names, "train", val.class_names, "val", where=data)
    return train, val


def check_same_classes(a: Iterable[str], a_name: str, b: Iterable[str], b_name: str, where: str) -> None:
    """Raises UserError naming the classes that only one of the two has."""
    only_a, only_b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    if only_a or only_b:
        parts = [f"only in {name}: {shorten(only)}" for name, only in [(a_name, only_a), (b_name, only_b)] if only]
        raise UserError(
            f"{where}: {a_name} and {b_name} must have the same classes, but {'; '.join(parts)}; "
            "add or remove those class folders"
        )
    if list(a) != list(b):
        raise UserError(
            f"{where}: {a_name} and {b_name} have the same classes in another order; labels would not match"
        )


def _source_type(data: str) -> SourceType:
    return SOURCES.get(data.partition(":")[0], folder)
