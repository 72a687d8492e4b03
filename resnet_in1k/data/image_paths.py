"""A list of image files and folders, without labels: for prediction."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from resnet_in1k.data.dataset import FileSource, PackedBytes
from resnet_in1k.data.image_folder import images_below


def open_paths(files: Sequence[str]) -> FileSource:
    """A source of these image files, in this order; all have the label 0."""
    return FileSource(
        name="images",
        split="val",
        class_names=("",),
        labels=np.zeros(len(files), dtype=np.int64),
        items=PackedBytes(map(os.fsencode, files)),
        folder=Path(),
    )


def list_images(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(image file, "") for each file and each image in a folder; (path, reason) for what cannot be read."""
    for path in paths:
        try:
            if path.is_dir():
                below = sorted(images_below(path, str(path), ignored=[], folders={}))
                yield from ((file, "") for file in below)
                if not below:
                    yield str(path), "no images in this folder"
            else:
                path.open("rb").close()
                yield str(path), ""
        except OSError as error:
            yield str(path), error.strerror or str(error)
