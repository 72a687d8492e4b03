"""ImageNet as Kaggle gives it: `ILSVRC/Data/CLS-LOC/` with labels of the validation images in LOC_val_solution.csv."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resnet_in1k.data.dataset import FileSource, PackedBytes
from resnet_in1k.data.image_folder import open_split
from resnet_in1k.prepare.imagenet_archives import check_counts, refuse_partial
from resnet_in1k.utils.errors import UserError

SOLUTION_NAME = "LOC_val_solution.csv"


def open_kaggle(folder: Path, allow_partial: bool, say: Callable[[str], None]) -> tuple[FileSource, FileSource]:
    """Train and val; `folder` is that into which the competition's archive was unpacked.

    Args:
        allow_partial: tell, and do not refuse, other counts than the original's.

    Raises:
        UserError: naming what is missing or does not fit.
    """
    images, solution = folder / "ILSVRC/Data/CLS-LOC", folder / SOLUTION_NAME
    if not images.is_dir() or not solution.is_file():
        raise UserError(f"{folder}: Kaggle's layout has ILSVRC/Data/CLS-LOC/ and {SOLUTION_NAME} in it")
    train = open_split(str(images), "train")
    labels = {wnid: label for label, wnid in enumerate(train.class_names)}
    try:
        with solution.open(newline="", encoding="utf-8") as file:
            classes = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        present = {Path(name).stem: name for name in os.listdir(images / "val") if not name.startswith(".")}
    except (OSError, KeyError, IndexError, AttributeError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{solution} cannot be read ({type(error).__name__}: {error})") from None
    for name in sorted(present.keys() ^ classes.keys()):
        where = f"no image in {images / 'val'}" if name in classes else f"no line in {solution}"
        raise UserError(f"{name}: {where}")
    for name, wnid in classes.items():
        if wnid not in labels:
            raise UserError(f"{solution}: {name} is of class {wnid}, which has no folder in {images / 'train'}")
    rows = sorted((labels[wnid], present[name]) for name, wnid in classes.items())
    val = FileSource(
        name=str(images),
        split="val",
        class_names=train.class_names,
        labels=np.array([label for label, _ in rows], dtype=np.int64),
        items=PackedBytes(os.fsencode(name) for _, name in rows),
        folder=images / "val",
    )
    check_counts((train, val), say if allow_partial else refuse_partial)
    return train, val
