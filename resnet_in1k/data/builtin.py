"""Images that need no download: `digits`, scikit-learn's handwritten digits, and `synthetic`, noise for benchmarks."""

import io

import numpy as np

from resnet_in1k.data.dataset import PackedBytes, PackedSource, SourceFacts, Split


class Digits:
    """scikit-learn's copy of UCI's handwritten digits, enlarged to 48 px; every fifth image of a class is in val."""

    @staticmethod
    def facts(data: str) -> SourceFacts:
        limits = (
            "The digits are those of scikit-learn: 8 × 8 pixels, written by 13 people and enlarged "
            "(the test set of https://archive.ics.uci.edu/dataset/80): a demonstration, not a reader of handwriting."
        )
        return SourceFacts("digits", "digits", limits)

    @staticmethod
    def open_split(data: str, split: Split) -> PackedSource:
        from PIL import Image
        from sklearn.datasets import load_digits

        digits = load_digits()
        place_in_class = np.empty(len(digits.target), dtype=np.int64)
        for label in range(10):
            members = np.flatnonzero(digits.target == label)
            place_in_class[members] = np.arange(len(members))
        chosen = np.flatnonzero((place_in_class % 5 == 4) == (split == "val"))

        def encode(index: int) -> bytes:
            gray = Image.fromarray((digits.images[index] * (255 / 16)).astype(np.uint8))  # 8 × 8, values 0 to 16
            file = io.BytesIO()
            gray.resize((48, 48), Image.Resampling.BICUBIC).save(file, format="PNG")
            return file.getvalue()

        return PackedSource(
            name="digits",
            split=split,
            class_names=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
            labels=digits.target[chosen].astype(np.int64),
            items=PackedBytes(encode(index) for index in chosen),
        )


class Synthetic:
    """JPEGs of noise, 500 × 375 pixels and about 110 kB like ImageNet's, in 1000 classes; 64 distinct images."""

    @staticmethod
    def facts(data: str) -> SourceFacts:
        limits = "Its images are noise: there is nothing to recognize, and the weights are good for timing only."
        return SourceFacts("synthetic", "synthetic", limits)

    @staticmethod
    def open_split(data: str, split: Split) -> PackedSource:
        from PIL import Image

        generator = np.random.default_rng((0, split == "val"))
        encoded: list[bytes] = []
        for _ in range(64):
            coarse = Image.fromarray(generator.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = np.clip(smooth + generator.integers(-16, 17, smooth.shape), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(noisy).save(file, format="JPEG", quality=85)
            encoded.append(file.getvalue())
        return PackedSource(
            name="synthetic",
            split=split,
            class_names=tuple(f"class_{label:03d}" for label in range(1000)),
            labels=np.arange(12_800 if split == "train" else 1_000, dtype=np.int64) % 1000,
            items=PackedBytes(encoded),
        )
