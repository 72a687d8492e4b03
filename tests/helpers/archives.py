"""Small archives with the nesting of ImageNet's three."""

import gzip
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io

WNIDS = ("n02000000", "n01000000", "n03000000")
"""WordNet ids of the devkit's class numbers 1, 2, 3, not sorted."""


class Archives(NamedTuple):
    train: Path
    val: Path
    devkit: Path


def add(archive: tarfile.TarFile, name: str, data: bytes, **changes: object) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for field, value in changes.items():
        setattr(entry, field, value)
    archive.addfile(entry, io.BytesIO(data))


def tar_of(entries: Iterable[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in entries:
            add(archive, name, data)
    return file.getvalue()


def tar_of_samples(samples: Iterable[tuple[str, bytes, int]]) -> bytes:
    """Return a shard with these keys, images and labels."""
    return tar_of(
        each for key, image, label in samples for each in ((f"{key}.jpg", image), (f"{key}.cls", b"%d" % label))
    )


def meta_mat() -> bytes:
    """Return the devkit's meta.mat with the classes, and a synset above the classes."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, wnid, f"name of {wnid}", 0) for number, wnid in enumerate(WNIDS, start=1)]
    synsets = np.array([*rows, (4, "n09000000", "above", 3)], dtype=fields)
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": synsets})
    return file.getvalue()


def devkit_of(truth: Iterable[int]) -> bytes:
    """Return the devkit's archive with these class numbers of the validation images."""
    entries = [
        ("meta.mat", meta_mat()),
        ("ILSVRC2012_validation_ground_truth.txt", "\n".join(map(str, truth)).encode()),
    ]
    return gzip.compress(tar_of((f"ILSVRC2012_devkit_t12/data/{name}", data) for name, data in entries))


def write_archives(folder: Path, images: list[bytes], repeats: int = 1) -> tuple[Archives, dict[str, bytes]]:
    """Write three classes of four training images, and six validation images; return the expected folder, too.

    Args:
        repeats: number of names of each image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, bytes] = {}
    inner = []
    for number, wnid in enumerate(WNIDS):
        entries = [(f"{wnid}_{place}.JPEG", images[4 * number + place % 4]) for place in range(4 * repeats)]
        expected |= {f"train/{wnid}/{name}": data for name, data in entries}
        inner.append((f"{wnid}.tar", tar_of(entries)))
    (folder / "train.tar").write_bytes(tar_of(inner))
    truth = [3, 1, 2, 2, 1, 3] * repeats
    val = [(f"ILSVRC2012_val_{place:08d}.JPEG", images[12 + (place - 1) % 6]) for place in range(1, 6 * repeats + 1)]
    for (name, data), label in zip(val, truth, strict=True):
        expected[f"val/{WNIDS[label - 1]}/{name}"] = data
    (folder / "val.tar").write_bytes(tar_of(val[::-1]))
    (folder / "devkit.tar.gz").write_bytes(devkit_of(truth))
    return Archives(folder / "train.tar", folder / "val.tar", folder / "devkit.tar.gz"), expected
