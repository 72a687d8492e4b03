"""Find images that cannot be decoded, are empty, are in both splits, or are in the folder of another class."""

import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_in1k.data.dataset import Source, Split
from resnet_in1k.data.decode import decode
from resnet_in1k.data.registry import check_same_classes, open_source, open_whole
from resnet_in1k.utils.console import progress_bar
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.pool import run_parallel

IMAGES_PER_JOB = 256
_WNID = re.compile(r"(n\d{8})_\d+\b")


SPLITS: tuple[Split, ...] = ("train", "val")


class Problem(NamedTuple):
    image: str
    kind: str
    """broken, empty, unreadable, duplicate or misfiled; for a split, not verified or classes."""
    detail: str


def open_for_verification(data: str, val_share: float) -> tuple[list[Source], list[Problem]]:
    """Open both splits, or all images of data without a val split; return them and what training would refuse.

    Raises:
        UserError: if nothing can be opened.
    """
    sources: list[Source] = []
    problems: list[Problem] = []
    for split in () if val_share else SPLITS:
        try:
            sources.append(open_source(data, split))
        except UserError as error:
            problems.append(Problem(f"{data} {split}", "not verified", str(error)))
    if not sources:
        return [open_whole(data)], []
    if not problems:
        try:
            check_same_classes(sources[0].class_names, "train", sources[1].class_names, "val", where="the splits")
        except UserError as error:
            problems.append(Problem(data, "classes", str(error)))
    return sources, problems


def verify(sources: list[Source], processes: int) -> Iterator[Problem]:
    """Yield the problems of each image, split by split, then the images that an earlier split has, too.

    Memory: eight bytes of hash per image.
    """
    hashes = []
    for source in sources:
        parts, jobs = list[np.ndarray](), list(range(0, len(source), IMAGES_PER_JOB))
        with progress_bar(len(source), f"{source.name} {source.split}") as bar:
            for part, problems in run_parallel(functools.partial(_verify_part, source), jobs, processes):
                parts.append(part)
                bar.update(len(part))
                yield from problems
        hashes.append(np.concatenate(parts))
    for place, (source, found) in enumerate(zip(sources, hashes, strict=True)):
        for other, earlier in zip(sources[:place], hashes[:place], strict=True):
            values, first_places = np.unique(earlier, return_index=True)
            for index in np.flatnonzero(np.isin(found, values) & (found != 0)).tolist():
                twin = int(first_places[np.searchsorted(values, found[index])])
                try:
                    is_same = source.read(index).tobytes() == other.read(twin).tobytes()
                except OSError as error:
                    yield Problem(source.image_name(index), "unreadable", error.strerror or str(error))
                    continue
                if is_same:
                    yield Problem(source.image_name(index), "duplicate", f"the same bytes as {other.image_name(twin)}")


def _verify_part(source: Source, start: int) -> tuple[np.ndarray, list[Problem]]:
    """Return the hashes of the images, (n,) uint64 with 0 for an empty image, and the problems."""
    problems, hashes = [], []
    for index in range(start, min(start + IMAGES_PER_JOB, len(source))):
        name, data = source.image_name(index), b""
        try:
            encoded = source.read(index)
            data = encoded.tobytes()
            if data:
                decode(encoded)
            else:
                problems.append(Problem(name, "empty", "no bytes"))
        except OSError as error:
            problems.append(Problem(name, "unreadable", error.strerror or str(error)))
        except ValueError as error:
            problems.append(Problem(name, "broken", str(error)))
        match, class_name = _WNID.match(Path(name).name), source.class_names[source.labels[index]]
        if match and re.fullmatch(r"n\d{8}", class_name) and match[1] != class_name:
            problems.append(Problem(name, "misfiled", f"named for {match[1]}, in the folder of {class_name}"))
        hashes.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "big") if data else 0)
    return np.array(hashes, dtype=np.uint64), problems
