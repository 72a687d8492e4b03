"""Folders of images, made by the tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def write_image_folder(root: Path, photographs: list[np.ndarray], classes: dict[str, int]) -> Path:
    """`root/{train,val}/<class>/<number>.jpg`: so many images in train, a third (at least 1) in val; all differ."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count if split == "train" else max(1, count // 3)):
                height, width = generator.integers(40, 90, 2)
                top, left = generator.integers(0, 300, 2)
                photograph = photographs[generator.integers(len(photographs))]
                crop = photograph[top : top + height, left : left + width]
                Image.fromarray(crop).save(folder / f"{number}.jpg", quality=90)
    return root


def tree_of_links(root: Path, image: Path, num_classes: int, images_per_class: int) -> Path:
    """Many images for little: links to one."""
    for split, count in (("train", images_per_class), ("val", 1)):
        for label in range(num_classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"n{label:08d}_{number}.JPEG").symlink_to(image)
    return root


def encoded(image: Image.Image, **how: object) -> np.ndarray:
    """The image as a file's bytes, (n,) uint8; `how` is what Image.save takes."""
    file = io.BytesIO()
    image.save(file, **how)
    return np.frombuffer(bytearray(file.getvalue()), dtype=np.uint8)
