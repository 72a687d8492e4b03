"""What is wrong with images: those that cannot be decoded, are empty, in two splits, or in another class's folder."""

import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.decode import decode
from resnet_in1k.utils.pool import Progress, run_parallel

IMAGES_PER_JOB = 256
_WNID = re.compile(r"(n\d{8})_\d+\b")


class Problem(NamedTuple):
    image: str
    kind: str
    """broken, empty, unreadable, duplicate or misfiled; of a split as a whole, not verified or classes."""
    detail: str


def verify(sources: list[Source], processes: int, progress: Progress) -> Iterator[Problem]:
    """All problems of the images, split by split; then images of a later split that an earlier one has too, by content.

    Of each image eight bytes are kept.
    """
    digests = []
    for source in sources:
        jobs = list(range(0, len(source), IMAGES_PER_JOB))
        found = np.zeros(len(source), dtype=np.uint64)
        progress.start(len(source), f"{source.name} {source.split}")
        for start, hashes, problems in run_parallel(functools.partial(_verify_part, source), jobs, processes):
            found[start : start + len(hashes)] = hashes
            progress.add(len(hashes))
            yield from problems
        progress.finish()
        digests.append(found)
    for place, (source, found) in enumerate(zip(sources, digests, strict=True)):
        for other, theirs in zip(sources[:place], digests[:place], strict=True):
            yield from _duplicates(source, found, other, theirs)


def _verify_part(source: Source, start: int) -> tuple[int, np.ndarray, list[Problem]]:
    problems, hashes = [], []
    for index in range(start, min(start + IMAGES_PER_JOB, len(source))):
        name, data = source.image_name(index), b""
        try:
            encoded = source.read(index)
            data = encoded.tobytes()
            if not data:
                problems.append(Problem(name, "empty", "no bytes"))
            else:
                decode(encoded)
        except OSError as error:
            problems.append(Problem(name, "unreadable", error.strerror or str(error)))
        except ValueError as error:
            problems.append(Problem(name, "broken", str(error)))
        class_name = source.class_names[source.labels[index]]
        match = _WNID.match(Path(name).name)
        if match and re.fullmatch(r"n\d{8}", class_name) and match[1] != class_name:
            problems.append(Problem(name, "misfiled", f"named for {match[1]}, in the folder of {class_name}"))
        hashes.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "big") if data else 0)
    return start, np.array(hashes, dtype=np.uint64), problems


def _duplicates(source: Source, found: np.ndarray, other: Source, theirs: np.ndarray) -> Iterator[Problem]:
    order = np.argsort(theirs, kind="stable")
    places = np.searchsorted(theirs[order], found).clip(max=max(0, len(theirs) - 1))
    for index in np.flatnonzero((theirs[order][places] == found) & (found != 0)).tolist():
        twin = int(order[places[index]])
        try:
            is_same = source.read(index).tobytes() == other.read(twin).tobytes()
        except OSError as error:  # since it was decoded
            yield Problem(source.image_name(index), "unreadable", error.strerror or str(error))
            continue
        if is_same:
            yield Problem(source.image_name(index), "duplicate", f"the same bytes as {other.image_name(twin)}")
