"""What is known of ImageNet-1k: its classes, its size, its mean and standard deviation."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HUB_ID = "ILSVRC/imagenet-1k"
NUM_TRAIN_IMAGES, NUM_VAL_IMAGES = 1_281_167, 50_000

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of its RGB values from 0 to 1, as torchvision and timm have them."""

WNIDS_FILE = Path(__file__).with_name("imagenet_wnids.txt")
"""The WordNet ids of its classes in the order of their labels, one a line; its folders are named by them."""


@functools.cache
def names_by_wnid() -> dict[str, str]:
    """The 1000 class names by WordNet id; the names are torchvision's."""
    from torchvision.models import ResNet50_Weights

    wnids = WNIDS_FILE.read_text(encoding="ascii").split()
    return dict(zip(wnids, ResNet50_Weights.IMAGENET1K_V2.meta["categories"], strict=True))


def human_names(class_names: Sequence[str]) -> list[str]:
    """WordNet ids of ImageNet-1k as names; any other class name stays as it is."""
    if not any(name.startswith(("n0", "n1")) for name in class_names):
        return list(class_names)
    names = names_by_wnid()
    return [names.get(name, name) for name in class_names]


def wnids_of(names: Sequence[str]) -> list[str] | None:
    """The WordNet ids, if these are the names of ImageNet-1k's 1000 classes in order; else None.

    Lists of them differ in some names and in the synonyms that follow a comma: nine of ten must agree.
    """
    if len(names) != 1000:
        return None
    known = names_by_wnid()
    agreeing = sum(
        name in (wnid, ours) or name.partition(",")[0].casefold() == ours.casefold()
        for name, (wnid, ours) in zip(names, known.items(), strict=True)
    )
    return list(known) if agreeing >= 900 else None


def is_imagenet_1k(class_names: Sequence[str]) -> bool:
    """Whether these are its 1000 classes, in order."""
    return len(class_names) == 1000 and list(class_names) == list(names_by_wnid())


def is_of_imagenet(evaluation: dict[str, Any], num_train_images: int) -> bool:
    """Whether an eval.json is of ImageNet-1k's own val split, after training on its train split; by its classes and the
    numbers of images, as other data have the same classes (ImageNetV2, subsets)."""
    return (
        is_imagenet_1k(evaluation["class_names"])
        and (evaluation["split"], evaluation["num_images"]) == ("val", NUM_VAL_IMAGES)
        and num_train_images == NUM_TRAIN_IMAGES
    )
