"""Facts about ImageNet-1k: its classes, size, mean and standard deviation."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_TRAIN_IMAGES, NUM_VAL_IMAGES = 1_281_167, 50_000

RGB = tuple[float, float, float]
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation per channel, for RGB values from 0 to 1, as in torchvision and timm."""


@functools.cache
def names_by_wnid() -> dict[str, str]:
    """Return torchvision's 1000 class names in the order of their labels, by WordNet id: the name of the folder."""
    from torchvision.models import ResNet50_Weights

    wnids = Path(__file__).with_name("imagenet_wnids.txt").read_text(encoding="ascii").split()
    return dict(zip(wnids, ResNet50_Weights.IMAGENET1K_V2.meta["categories"], strict=True))


def human_names(class_names: Sequence[str]) -> list[str]:
    """Replace WordNet ids of ImageNet-1k by names; other class names stay unchanged."""
    if not any(name.startswith(("n0", "n1")) for name in class_names):
        return list(class_names)
    names = names_by_wnid()
    return [names.get(name, name) for name in class_names]


def wnids_of(names: Sequence[str]) -> list[str] | None:
    """Return the WordNet ids if these are ImageNet-1k's 1000 classes in order, else None.

    Published lists differ in some names and in the synonyms after a comma, so nine of ten names must agree.
    """
    if len(names) != 1000:
        return None
    known = names_by_wnid()
    agreeing = sum(
        name in (wnid, ours) or name.partition(",")[0].casefold() == ours.casefold()
        for name, (wnid, ours) in zip(names, known.items(), strict=True)
    )
    return list(known) if agreeing >= 900 else None


def is_of_imagenet(evaluation: dict[str, Any], num_train_images: int) -> bool:
    """True if an eval.json was measured on ImageNet-1k's own validation split, after training on its train split.

    The numbers of images decide, too, because other datasets have the same classes (ImageNetV2, subsets).
    """
    return (
        list(evaluation["class_names"]) == list(names_by_wnid())
        and (evaluation["split"], evaluation["num_images"]) == ("val", NUM_VAL_IMAGES)
        and num_train_images == NUM_TRAIN_IMAGES
    )
