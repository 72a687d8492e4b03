"""Find images that cannot be decoded, are empty, are in both splits, or are in the folder of another class."""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import decode
from resnet_in1k.data.registry import open_source, open_train_and_val, open_whole
from resnet_in1k.utils.console import progress_bar
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.pool import run_parallel

IMAGES_PER_JOB = 256


class Problem(NamedTuple):
    image: str
    kind: str
    """broken, empty, unreadable, duplicate or misfiled; for all the data, splits."""
    detail: str


def open_for_verification(data: str, val_share: float) -> tuple[list[Source], list[Problem]]:
    """Open both splits, or all images of data without a val split; return them and why training would refuse them."""
    if val_share:
        return [open_whole(data)], []
    try:
        return list(open_train_and_val(data)), []
    except UserError as error:
        problems = [Problem(data, "splits", str(error))]
    sources: list[Source] = []
    for split in ("train", "val"):
        with contextlib.suppress(UserError):
            sources.append(open_source(data, split))
    return (sources, problems) if sources else ([open_whole(data)], [])


def verify(sources: list[Source], processes: int) -> Iterator[Problem]:
    """Yield the problems of each image, then the validation images that are training images, too."""
    jobs = [(split, start) for split, source in enumerate(sources) for start in range(0, len(source), IMAGES_PER_JOB)]
    parts: list[np.ndarray] = []
    with progress_bar(sum(map(len, sources)), sources[0].name) as bar:
        for hashes, problems in run_parallel(functools.partial(_verify_part, sources), jobs, processes):
            parts.append(hashes)
            bar.update(len(hashes))
            yield from problems
    train, val = np.split(np.concatenate(parts), [len(sources[0])])
    known, places = np.unique(train, return_index=True)
    for index in np.flatnonzero(np.isin(val, known)).tolist():
        twin = sources[0].image_name(int(places[np.searchsorted(known, val[index])]))
        yield Problem(sources[1].image_name(index), "duplicate", f"the same content as {twin}")


def _verify_part(sources: list[Source], job: tuple[int, int]) -> tuple[np.ndarray, list[Problem]]:
    """Return the hashes of the images, (n,) uint64, and the problems."""
    source, start = sources[job[0]], job[1]
    problems, hashes = [], []
    for index in range(start, min(start + IMAGES_PER_JOB, len(source))):
        name, encoded = source.image_name(index), np.empty(0, dtype=np.uint8)
        try:
            encoded = source.read(index)
            decode(encoded)
        except OSError as error:
            problems.append(Problem(name, "unreadable", error.strerror or str(error)))
        except ValueError as error:
            problems.append(Problem(name, "broken" if len(encoded) else "empty", str(error)))
        match, class_name = re.match(r"(n\d{8})_\d+\b", Path(name).name), source.class_names[source.labels[index]]
        if match and re.fullmatch(r"n\d{8}", class_name) and match[1] != class_name:
            problems.append(Problem(name, "misfiled", f"named for {match[1]}, in the folder of {class_name}"))
        content = encoded.tobytes() or os.fsencode(name)  # two empty images are not duplicates
        hashes.append(int.from_bytes(hashlib.sha256(content).digest()[:8], "big"))  # of a million images 8 MB
    return np.array(hashes, dtype=np.uint64), problems
