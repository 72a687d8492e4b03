"""`hf:NAME[:CONFIG[:TRAIN,VAL]]`: an image set of the Hub, or a local folder of parquet files, by `datasets`.

The table is mapped from the disk, and images stay encoded: the same decoder and augmentation run as for files.
"""

import errno
import hashlib
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from resnet_in1k.core.errors import UserError
from resnet_in1k.core.imagenet import wnids_of
from resnet_in1k.core.text import first_line, shorten
from resnet_in1k.data.source import SourceFacts, Split

PREFIX = "hf:"
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("validation", "val", "valid", "test")}
"""Of the sets on the Hub, in this order of preference."""


class TableSource:
    """One split: a column of encoded images and one of labels."""

    def __init__(
        self,
        name: str,
        split: Split,
        table: Any,
        image_column: str,
        labels: np.ndarray,
        class_names: tuple[str, ...],
        note: str = "",
        rows: np.ndarray | None = None,
    ):
        """
        Args:
            table: a `datasets.Dataset`, which pickles as the paths of its files.
            labels: of the images of this source.
            rows: which of the table's they are; None: all.
        """
        self.name, self.split, self.class_names, self.labels, self.note = name, split, class_names, labels, note
        self._table, self._image_column, self._rows = table, image_column, rows

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def split_name(self) -> str:
        """Of the table's, which need not be this source's."""
        return str(self._table.split)

    def _image(self, index: int) -> Any:
        return self._table.data.column(self._image_column)[self._row(index)]

    def _row(self, index: int) -> int:
        return index if self._rows is None else int(self._rows[index])

    def key(self, index: int) -> bytes:
        """Its row: a table's images need not have names."""
        return str(self._row(index)).encode()

    def take(self, indices: np.ndarray, split: Split) -> "TableSource":
        rows = indices if self._rows is None else self._rows[indices]
        labels = self.labels[indices]
        return TableSource(self.name, split, self._table, self._image_column, labels, self.class_names, self.note, rows)

    def read(self, index: int) -> np.ndarray:
        image = self._image(index)
        data, path = (image[name] if image.is_valid else None for name in ("bytes", "path"))
        if data is not None and data.is_valid:
            return np.frombuffer(bytearray(data.as_buffer()), dtype=np.uint8)
        if path is None or not path.is_valid:
            raise OSError(errno.ENODATA, f"{self.image_name(index)} has no bytes in the table")
        return np.frombuffer(bytearray(Path(path.as_py()).read_bytes()), dtype=np.uint8)

    def image_name(self, index: int) -> str:
        image = self._image(index).as_py() or {}
        path = image.get("path")
        return f"{self.name}/{self.split_name}[{self._row(index)}]" + (f" ({path})" if path else "")

    def fingerprint(self) -> str:
        import pyarrow.compute

        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        digest.update(self.labels)
        if self._rows is not None:
            digest.update(self._rows)
        for chunk in self._table.data.column(self._image_column).chunks:
            sizes = pyarrow.compute.binary_length(chunk.field("bytes"))
            digest.update(sizes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64))
        return digest.hexdigest()


def facts(data: str) -> SourceFacts:
    name = data.removeprefix(PREFIX).split(":")[0]
    is_local = Path(name).exists()
    flag = f"{PREFIX}path/to/{Path(name).name}" if is_local else data
    limits = ("Who took the training images, where and of what, is for the data set's own page to say.",)
    return SourceFacts(name=Path(name).name if is_local else name, data_flag=shlex.quote(flag), limits=limits)


def open_split(data: str, split: Split) -> TableSource:
    """Raises UserError if there is no such set, it may not be read, or it has no images with labels."""
    name, config, given = _parts(data)
    if split == "train" and given and "," not in given:
        raise UserError(
            f"--data {data}: one split, which cannot be trained and validated on; name both, as in "
            f"{PREFIX}{name}:{config}:{given},VAL, or give --val-share"
        )
    sets = _load(data, name, config)
    wanted = tuple(given.split(",")[0 if split == "train" else -1 :][:1]) if given else SPLIT_NAMES[split]
    source = _open(data, split, sets, wanted)
    if not given and source.split_name == "test":
        source.note = "validation is on the split test"
    return source


def open_whole(data: str) -> TableSource:
    """Of the training split, or of the one that is named."""
    name, config, given = _parts(data)
    sets = _load(data, name, config)
    val = [given.partition(",")[2]] if given else [each for each in SPLIT_NAMES["val"] if each in sets]
    if val and val[0]:
        named = f"{PREFIX}{name}:{config}:{given.partition(',')[0] or 'train'}"
        raise UserError(
            f"--val-share: {data} has a val split, {val[0]}; leave it out, or name the one to divide: {named}"
        )
    return _open(data, "train", sets, (given,) if given else SPLIT_NAMES["train"])


def _parts(data: str) -> tuple[str, str, str]:
    """The name, the configuration and the splits, "" where they are not given."""
    name, config, given = (*data.removeprefix(PREFIX).split(":", 2), "", "")[:3]
    return name, config, given


def _open(data: str, split: Split, sets: Any, wanted: tuple[str, ...]) -> TableSource:
    """The first of the splits `wanted` that there is in a `datasets.DatasetDict`."""
    import datasets

    found = next((each for each in wanted if each in sets), None)
    if found is None:
        name, config, _ = _parts(data)
        without = ", or give --val-share" if split == "val" else ""
        raise UserError(
            f"--data {data}: no split named {' or '.join(wanted)}, but {', '.join(sets)}; name them: "
            f"{PREFIX}{name}:{config}:TRAIN,VAL{without}"
        )
    table = sets[found]
    image_column = _column(data, table, datasets.Image, "images")
    label_column = _column(data, table, datasets.ClassLabel, "labels (ClassLabel)")
    names = list(table.features[label_column].names)
    class_names = tuple(wnids_of(names) or names)  # ImageNet-1k's, as its folders are named
    table = table.cast_column(image_column, datasets.Image(decode=False))
    labels = np.asarray(table.data.column(label_column).to_numpy(), dtype=np.int64)
    if len(labels) == 0 or labels.min() < 0:  # -1 is what a test split without labels has
        unlabelled = int((labels < 0).sum())
        raise UserError(f"--data {data}: {unlabelled:,} of {len(labels):,} images in {found} have no label")
    return TableSource(data, split, table, image_column, labels, class_names)


def _load(data: str, name: str, config: str) -> Any:
    """A `datasets.DatasetDict`."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config or None)
    except DatasetNotFoundError as error:
        advice = "is the name right? A private or gated one needs `hf auth login`"
        if "gated" in str(error):
            advice = f"accept its terms at https://huggingface.co/datasets/{name}, then `hf auth login`"
        raise UserError(f"--data {data}: {first_line(error)}; {advice}") from None
    except Exception as error:  # of the client, the file formats, the disk: they share no base class
        raise UserError(f"--data {data} cannot be loaded ({type(error).__name__}: {first_line(error)})") from None


def _column(data: str, table: Any, kind: type, what: str) -> str:
    names = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        columns = shorten([f"{name} ({type(feature).__name__})" for name, feature in table.features.items()], 9)
        raise UserError(f"--data {data}: {len(names) or 'no'} columns of {what}, where one is needed: {columns}")
    return names[0]
