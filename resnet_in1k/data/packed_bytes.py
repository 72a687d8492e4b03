"""A compact list of byte strings (paths, keys or encoded images), and the file that caches a listing of images."""

import contextlib
import json
import zipfile
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from resnet_in1k.utils import files

CACHE_VERSION = 2


class PackedBytes:
    """An immutable list of byte strings in two arrays.

    A Python list of a million paths is a million objects: each loader worker that reads one changes its reference
    count and so copies its page of memory, and host memory grows during the run (pytorch#5902).
    """

    def __init__(self, items: Iterable[bytes]):
        blob, ends = bytearray(), array("q", [0])
        for item in items:
            blob += item
            ends.append(len(blob))
        self.blob = np.frombuffer(blob, dtype=np.uint8)  # (n,), all items in a row
        self.ends = np.frombuffer(ends, dtype=np.int64)  # (N + 1,), item i is blob[ends[i]:ends[i + 1]]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.view(index).tobytes()

    def view(self, index: int) -> np.ndarray:
        """Return an item's bytes without a copy, (n,) uint8."""
        return self.blob[self.ends[index] : self.ends[index + 1]]


def write_cache(file: Path, facts: dict[str, Any], items: PackedBytes, **arrays: np.ndarray) -> None:
    """Write a listing of images. `facts` may have any JSON values. Raises OSError if the file cannot be written."""

    def write(path: Path) -> None:
        text = np.frombuffer(json.dumps({"version": CACHE_VERSION, **facts}).encode(), dtype=np.uint8)
        with path.open("wb") as stream:
            np.savez(stream, facts=text, blob=items.blob, ends=items.ends, **arrays)

    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(file, write)


def read_cache(file: Path) -> tuple[dict[str, Any], PackedBytes, dict[str, np.ndarray]] | None:
    """Read a listing; None if there is none, or the file is damaged or of another version."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as cached:
            arrays = {name: cached[name] for name in cached.files}
        facts, items = json.loads(arrays.pop("facts").tobytes()), PackedBytes(())
        items.blob, items.ends = arrays.pop("blob"), arrays.pop("ends")
        if facts["version"] == CACHE_VERSION:
            return facts, items, arrays
    return None
