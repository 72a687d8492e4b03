"""scikit-learn's copy of UCI's handwritten digits, enlarged and encoded as PNG; every fifth of a class is in val."""

import io

import numpy as np

from resnet_in1k.data.dataset import PackedBytes, PackedSource, SourceFacts, Split


def facts(data: str) -> SourceFacts:
    limits = (
        "The digits are those of scikit-learn: 8 × 8 pixels, written by 13 people and enlarged "
        "(the test set of https://archive.ics.uci.edu/dataset/80): a demonstration, not a reader of handwriting.",
    )
    return SourceFacts(name="digits", data_flag="digits", limits=limits)


def open_split(data: str, split: Split) -> PackedSource:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    place_in_class = np.empty(len(digits.target), dtype=np.int64)
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        place_in_class[members] = np.arange(len(members))
    chosen = np.flatnonzero((place_in_class % 5 == 4) == (split == "val"))

    def encoded(index: int) -> bytes:
        gray = Image.fromarray((digits.images[index] * (255 / 16)).astype(np.uint8))  # 8 × 8, values 0 to 16
        file = io.BytesIO()
        gray.resize((48, 48), Image.Resampling.BICUBIC).save(file, format="PNG")
        return file.getvalue()

    return PackedSource(
        name="digits",
        split=split,
        class_names=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        labels=digits.target[chosen].astype(np.int64),
        items=PackedBytes(encoded(index) for index in chosen),
    )
