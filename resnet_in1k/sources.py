"""Where images come from: a source is a list of encoded files with labels, wherever they lie.

The ways to name one (`--data`):

- a folder with `train/<class>/*` and `val/<class>/*`,
- `digits`: scikit-learn's 1,797 handwritten digits, enlarged and encoded as PNG,
- `synthetic`: made-up JPEGs of ImageNet's size, for benchmarks.
"""

import hashlib
import io
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from resnet_in1k.errors import UserError

Split = Literal["train", "val"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


class PackedBytes:
    """An immutable list of byte strings in two arrays.

    A Python list of a million paths is a million objects: each loader worker that touches one rewrites its reference
    count and so copies the page it lies on, and host memory grows all through the run (pytorch#5902). Two arrays are
    two objects.
    """

    def __init__(self, items: Iterable[bytes]):
        blob, ends = bytearray(), array("q", [0])
        for item in items:
            blob += item
            ends.append(len(blob))
        self._blob = np.frombuffer(blob, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.view(index).tobytes()

    def view(self, index: int) -> np.ndarray:
        """The bytes of an item where they lie, (n,) uint8."""
        return self._blob[self._ends[index] : self._ends[index + 1]]

    @property
    def num_bytes(self) -> int:
        return self._blob.nbytes + self._ends.nbytes

    def update(self, digest: "hashlib._Hash") -> None:
        digest.update(self._blob)
        digest.update(self._ends)


@dataclass(frozen=True)
class Source:
    """One split: `len(source)` encoded images with their labels.

    `items` are the encoded images themselves, or their paths below `folder` where there is one. Where there are fewer
    items than labels they repeat from the start, so that `synthetic` can be long and small.
    """

    name: str
    """What `--data` said."""
    split: Split
    class_names: tuple[str, ...]
    labels: np.ndarray
    """(N,) int64, indices into class_names."""
    items: PackedBytes
    folder: Path | None = None
    note: str = ""
    """What a person should know about how the files were found."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """The encoded image, (n,) uint8; not to be written to."""
        if self.folder is None:
            return self.items.view(index % len(self.items))
        # Not by np.fromfile, which takes a read error for the end of the file.
        with open(os.path.join(os.fsencode(self.folder), self._item(index)), "rb", buffering=0) as file:
            return np.frombuffer(bytearray(file.readall()), dtype=np.uint8)

    def image_name(self, index: int) -> str:
        """How to speak of the image to a person: its path, or its place in the source."""
        if self.folder is None:
            return f"{self.name}/{self.split}[{index}]"
        return str(Path(self.folder, os.fsdecode(self._item(index))))

    def _item(self, index: int) -> bytes:
        return self.items[index % len(self.items)]

    def fingerprint(self) -> str:
        """sha256 over class names, labels and items (a folder's relative paths): the same data, the same value."""
        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        digest.update(self.labels)
        self.items.update(digest)
        return digest.hexdigest()


def open_source(data: str, split: Split) -> Source:
    """One split of what `--data` names.

    Raises:
        UserError: if there is no such data, or it is not laid out as images by class.
    """
    if data == "digits":
        return _digits(split)
    if data == "synthetic":
        return _synthetic(split)
    return _folder(data, split)


def open_train_and_val(data: str) -> tuple[Source, Source]:
    """Both splits, with the same classes.

    Raises:
        UserError: as `open_source`, and if the two splits do not have the same classes.
    """
    train, val = open_source(data, "train"), open_source(data, "val")
    check_same_classes(train.class_names, "train", val.class_names, "val", where=data)
    return train, val


def check_same_classes(a: Iterable[str], a_name: str, b: Iterable[str], b_name: str, where: str) -> None:
    """Raises UserError naming the classes that only one of the two has."""
    only_a, only_b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    if only_a or only_b:
        parts = [f"only in {name}: {some(only)}" for name, only in [(a_name, only_a), (b_name, only_b)] if only]
        raise UserError(
            f"{where}: {a_name} and {b_name} must have the same classes, but {'; '.join(parts)}; "
            "add or remove those class folders"
        )
    if list(a) != list(b):
        raise UserError(
            f"{where}: {a_name} and {b_name} have the same classes in another order; labels would be mixed up"
        )


def _folder(data: str, split: Split) -> Source:
    root, folder = Path(data), Path(data, split)
    layout = "images belong in DATA/train/<class>/ and DATA/val/<class>/"
    if not root.is_dir():
        raise UserError(f"--data {data}: no such folder; {layout}, or use --data digits to try without data")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {layout}")

    try:
        entries = sorted(_visible(folder), key=lambda entry: entry.name)
        classes = [entry.name for entry in entries if entry.is_dir()]
        stray = [entry.name for entry in entries if not entry.is_dir()]
        if stray:
            raise UserError(f"{folder}: files must lie in a folder named for their class, not here: {some(stray)}")
        if not classes:
            raise UserError(f"{folder}: no class folders in it; {layout}")

        counts: list[int] = []
        ignored: list[str] = []

        def paths() -> Iterator[bytes]:
            for name in classes:
                images = sorted(images_below(folder / name, name, ignored))
                if not images:
                    raise UserError(f"{folder / name}: no images in this class; add some or remove the folder")
                counts.append(len(images))
                yield from map(os.fsencode, images)

        items = PackedBytes(paths())
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}; check its permissions") from None

    return Source(
        name=data,
        split=split,
        class_names=tuple(classes),
        labels=np.repeat(np.arange(len(classes)), counts),
        items=items,
        folder=folder,
        note=f"ignored in {folder}, not images by name or content: {some(ignored)}" if ignored else "",
    )


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """Entries but for hidden ones, which operating systems and editors leave about."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def images_below(folder: Path, prefix: str, ignored: list[str]) -> list[str]:
    """Paths of image files at any depth, relative to the split's folder; other files are added to `ignored`."""
    images: list[str] = []
    for entry in _visible(folder):
        relative = f"{prefix}/{entry.name}"
        if entry.is_dir():
            images += images_below(folder / entry.name, relative, ignored)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) or _is_image_by_content(folder / entry.name):
            images.append(relative)
        else:
            ignored.append(relative)
    return images


def _is_image_by_content(path: Path) -> bool:
    """Whether Pillow knows the file's header: for files whose names do not tell, of which there are few or all."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path).close()
    except OSError:
        return False
    except (ValueError, SyntaxError, Image.DecompressionBombError):
        return True  # an image, but a bad one: that must come to light
    return True


def some(names: list[str], at_most: int = 3) -> str:
    """The first few, and how many more there are."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


def _digits(split: Split) -> Source:
    """scikit-learn's copy of UCI's handwritten digits; every fifth image of each class is for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    place_in_class = np.empty(len(digits.target), dtype=np.int64)
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        place_in_class[members] = np.arange(len(members))
    chosen = np.flatnonzero((place_in_class % 5 == 4) == (split == "val"))

    def encoded(index: int) -> bytes:
        grey = Image.fromarray((digits.images[index] * (255 / 16)).astype(np.uint8))  # 8 × 8, values 0 to 16
        file = io.BytesIO()
        grey.resize((48, 48), Image.Resampling.BICUBIC).save(file, format="PNG")
        return file.getvalue()

    return Source(
        name="digits",
        split=split,
        class_names=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        labels=digits.target[chosen].astype(np.int64),
        items=PackedBytes(encoded(index) for index in chosen),
    )


SYNTHETIC_NUM_IMAGES: dict[Split, int] = {"train": 12_800, "val": 1_000}
_SYNTHETIC_NUM_DISTINCT = 64


def _synthetic(split: Split) -> Source:
    """Noise with the size in pixels and in bytes of a typical ImageNet file: 500 × 375, about 110 kB, 1000 classes."""
    from PIL import Image

    generator = np.random.default_rng((0, split == "val"))
    files: list[bytes] = []
    for _ in range(_SYNTHETIC_NUM_DISTINCT):
        coarse = Image.fromarray(generator.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + generator.integers(-16, 17, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, format="JPEG", quality=85)
        files.append(file.getvalue())
    num_images = SYNTHETIC_NUM_IMAGES[split]
    return Source(
        name="synthetic",
        split=split,
        class_names=tuple(f"class_{label:03d}" for label in range(1000)),
        labels=np.arange(num_images, dtype=np.int64) % 1000,
        items=PackedBytes(files),
    )
