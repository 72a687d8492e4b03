"""What people call the classes: ImageNet's folders are named by WordNet ids."""

import functools
from collections.abc import Sequence
from pathlib import Path

WNIDS_FILE = Path(__file__).with_name("imagenet_wnids.txt")
"""The WordNet ids of ImageNet-1k in the order of its labels, one a line."""


@functools.cache
def imagenet_names() -> dict[str, str]:
    """Name by WordNet id, for the 1000 classes; the names are torchvision's."""
    from torchvision.models import ResNet50_Weights

    wnids = WNIDS_FILE.read_text(encoding="ascii").split()
    return dict(zip(wnids, ResNet50_Weights.IMAGENET1K_V2.meta["categories"], strict=True))


def human_names(class_names: Sequence[str]) -> list[str]:
    """WordNet ids of ImageNet-1k as names; what is none stays as it is."""
    if not any(name.startswith(("n0", "n1")) for name in class_names):
        return list(class_names)
    names = imagenet_names()
    return [names.get(name, name) for name in class_names]


def is_imagenet_1k(class_names: Sequence[str]) -> bool:
    """Whether these are its 1000 classes, in order."""
    return len(class_names) == 1000 and list(class_names) == list(imagenet_names())
