"""Images that need no download: `digits`, scikit-learn's handwritten digits, and `synthetic`, noise for benchmarks."""

import io

import numpy as np
import torch
from PIL import Image

from resnet_in1k.data.dataset import PackedBytes, PackedSource, SourceFacts, Split
from resnet_in1k.data.sampler import repeat_index


class Digits:
    """scikit-learn's copy of UCI's handwritten digits, enlarged to 48 px; every fifth image of a class is in val."""

    @staticmethod
    def facts(data: str) -> SourceFacts:
        limits = (
            "The digits are those of scikit-learn: 13 people wrote them, and each has 8 × 8 pixels, enlarged here (the "
            "test set of https://archive.ics.uci.edu/dataset/80). The model is a demonstration, not a reader of "
            "handwriting."
        )
        return SourceFacts("digits", "digits", limits)

    @staticmethod
    def open_split(data: str, split: Split) -> PackedSource:
        from sklearn.datasets import load_digits

        digits = load_digits()
        place_in_class = repeat_index(torch.from_numpy(digits.target)).numpy()
        chosen = np.flatnonzero((place_in_class % 5 == 4) == (split == "val"))
        pixels = (digits.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8), from 0 to 16 before
        pictures = (Image.fromarray(each).resize((48, 48), Image.Resampling.BICUBIC) for each in pixels)
        return PackedSource(
            name="digits",
            split=split,
            class_names=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
            labels=digits.target[chosen].astype(np.int64),
            items=PackedBytes(_encode(picture, format="PNG") for picture in pictures),
        )


class Synthetic:
    """JPEGs of noise, 500 × 375 pixels and about 110 kB like ImageNet's, in 1000 classes; 64 distinct images."""

    @staticmethod
    def facts(data: str) -> SourceFacts:
        limits = "The images are noise. There is nothing to recognize, and the weights are of use for timing only."
        return SourceFacts("synthetic", "synthetic", limits)

    @staticmethod
    def open_split(data: str, split: Split) -> PackedSource:
        generator = np.random.default_rng((0, split == "val"))
        encoded: list[bytes] = []
        for _ in range(64):
            coarse = Image.fromarray(generator.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = np.clip(smooth + generator.integers(-16, 17, smooth.shape), 0, 255).astype(np.uint8)
            encoded.append(_encode(Image.fromarray(noisy), format="JPEG", quality=85))
        return PackedSource(
            name="synthetic",
            split=split,
            class_names=tuple(f"class_{label:03d}" for label in range(1000)),
            labels=np.arange(12_800 if split == "train" else 1_000, dtype=np.int64) % 1000,
            items=PackedBytes(encoded),
        )


def _encode(picture: Image.Image, **how: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, **how)
    return file.getvalue()
