"""Generated JPEGs with the size of typical ImageNet files, in 1000 classes: for benchmarks."""

import io

import numpy as np

from resnet_in1k.data.dataset import PackedBytes, PackedSource, SourceFacts, Split

NUM_IMAGES: dict[Split, int] = {"train": 12_800, "val": 1_000}
NUM_DISTINCT_IMAGES = 64


def facts(data: str) -> SourceFacts:
    limits = ("Its images are noise: there is nothing to recognize, and the weights are good for timing only.",)
    return SourceFacts(name="synthetic", data_flag="synthetic", limits=limits)


def open_split(data: str, split: Split) -> PackedSource:
    """Noise of 500 × 375 pixels, about 110 kB each."""
    from PIL import Image

    generator = np.random.default_rng((0, split == "val"))
    files: list[bytes] = []
    for _ in range(NUM_DISTINCT_IMAGES):
        coarse = Image.fromarray(generator.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + generator.integers(-16, 17, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, format="JPEG", quality=85)
        files.append(file.getvalue())
    return PackedSource(
        name="synthetic",
        split=split,
        class_names=tuple(f"class_{label:03d}" for label in range(1000)),
        labels=np.arange(NUM_IMAGES[split], dtype=np.int64) % 1000,
        items=PackedBytes(files),
    )
