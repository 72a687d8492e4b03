"""`hf:NAME[:CONFIG[:TRAIN,VAL[:LABEL]]]`: an image set of the Hub, or a local folder of parquet files, by `datasets`.

The table is mapped from the disk, and images stay encoded: the same decoder and augmentation run as for files.
"""

import errno
import hashlib
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_in1k.data.dataset import SourceFacts, Split
from resnet_in1k.utils.console import heartbeat
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line, shorten
from resnet_in1k.utils.imagenet import wnids_of

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


class Address(NamedTuple):
    """The parts of `hf:NAME:CONFIG:TRAIN,VAL:LABEL`, "" where they are not given."""

    name: str
    config: str = ""
    splits: str = ""
    label: str = ""

    @classmethod
    def of(cls, data: str) -> "Address":
        return cls(*data.removeprefix(PREFIX).split(":", 3))

    def __str__(self) -> str:
        return PREFIX + ":".join(self).rstrip(":")


def facts(data: str) -> SourceFacts:
    address = Address.of(data)
    if Path(address.name).exists():
        address = address._replace(name=f"path/to/{Path(address.name).name}")
    limits = ("Who took the training images, where and of what, is for the data set's own page to say.",)
    name = address.name.removeprefix("path/to/")
    return SourceFacts(name=name, data_flag=shlex.quote(str(address)), limits=limits)


def open_split(data: str, split: Split) -> TableSource:
    """Raises UserError if there is no such set, it may not be read, or it has no images with labels."""
    address = Address.of(data)
    if split == "train" and address.splits and "," not in address.splits:
        both = address._replace(splits=f"{address.splits},VAL")
        raise UserError(
            f"--data {data}: one split, which cannot be trained and validated on; name both, as in {both}, or give "
            "--val-share"
        )
    wanted = SPLIT_NAMES[split]
    if address.splits:
        wanted = (address.splits.split(",")[0 if split == "train" else -1],)
    source = _open(data, split, _load(data), wanted)
    if not address.splits and source.split_name == "test":
        source.note = "validation is on the split test"
    return source


def open_whole(data: str) -> TableSource:
    """Of the training split, or of the one that is named."""
    address, sets = Address.of(data), _load(data)
    train, _, val = address.splits.partition(",")
    if not train:
        val = next((name for name in SPLIT_NAMES["val"] if name in sets), "")
    if val:
        named = address._replace(splits=train or "train")
        raise UserError(f"--val-share: {data} has a val split, {val}; leave it out, or name the one to divide: {named}")
    return _open(data, "train", sets, (train,) if train else SPLIT_NAMES["train"])


def _open(data: str, split: Split, sets: Any, wanted: tuple[str, ...]) -> TableSource:
    """The first of the splits `wanted` that there is in a `datasets.DatasetDict`."""
    import datasets

    found = next((each for each in wanted if each in sets), None)
    if found is None:
        named = Address.of(data)._replace(splits="TRAIN,VAL")
        without = ", or give --val-share" if split == "val" else ""
        raise UserError(
            f"--data {data}: no split named {' or '.join(wanted)}, but {', '.join(sets)}; name them: {named}{without}"
        )
    table = sets[found]
    image_column = _image_column(data, table)
    label_column = _label_column(data, table)
    class_names, labels = _labels(label_column, table, sets)
    table = table.cast_column(image_column, datasets.Image(decode=False))
    if len(labels) == 0 or labels.min() < 0:  # -1 is what a test split without labels has
        unlabeled = int((labels < 0).sum())
        raise UserError(f"--data {data}: {unlabeled:,} of {len(labels):,} images in {found} have no label")
    return TableSource(data, split, table, image_column, labels, class_names)


def _load(data: str) -> Any:
    """A `datasets.DatasetDict`."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    address = Address.of(data)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # each of their steps would be a line of the log
    try:
        with heartbeat(f"{data} is being downloaded, and copied to {datasets.config.HF_DATASETS_CACHE}"):
            return datasets.load_dataset(address.name, address.config or None)
    except DatasetNotFoundError as error:
        advice = "is the name right? A private or gated one needs `hf auth login`"
        if "gated" in str(error):
            advice = f"accept its terms at https://huggingface.co/datasets/{address.name}, then `hf auth login`"
        raise UserError(f"--data {data}: {first_line(error)}; {advice}") from None
    except ConnectionError as error:
        raise UserError(
            f"--data {data} cannot be loaded ({first_line(error)}); without a network only what was downloaded before, "
            "to this machine's HF_HOME, can be read"
        ) from None
    except Exception as error:  # of the client, the file formats, the disk: they share no base class
        raise UserError(f"--data {data} cannot be loaded ({type(error).__name__}: {first_line(error)})") from None


def _image_column(data: str, table: Any) -> str:
    import datasets

    names = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if len(names) != 1:
        raise UserError(
            f"--data {data}: {len(names) or 'no'} columns of images, where one is needed: {_columns(table)}"
        )
    return names[0]


def _label_column(data: str, table: Any) -> str:
    """The one that is named, or the only one of ClassLabel."""
    import datasets

    address = Address.of(data)
    names = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if address.label:
        kind = getattr(table.features.get(address.label), "dtype", "")
        if kind not in ("string", "large_string") and "int" not in kind:
            raise UserError(f"--data {data}: {address.label} is no column of labels; the columns: {_columns(table)}")
        return address.label
    if len(names) != 1:
        named = address._replace(label="COLUMN")
        raise UserError(
            f"--data {data}: {len(names) or 'no'} columns of labels (ClassLabel), where one is needed: "
            f"{_columns(table)}; name it: {named}"
        )
    return names[0]


def _columns(table: Any) -> str:
    kinds = {
        name: feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__
        for name, feature in table.features.items()
    }
    return shorten([f"{name} ({kind})" for name, kind in kinds.items()], 9)


def _labels(column: str, table: Any, sets: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """The class names, and the labels of the table, (N,) int64, -1 for none."""
    import datasets
    import pyarrow.compute

    cells = table.data.column(column)
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(wnids_of(feature.names) or feature.names)  # ImageNet-1k's, as its folders are named
        return names, cells.fill_null(-1).to_numpy().astype(np.int64)
    # Numbers or names: the classes are those of all splits, so that one that has not all of them has the same labels.
    values = sorted({value for each in sets.values() for value in each.unique(column) if value is not None})
    values = [value for value in values if value != -1]
    places = pyarrow.compute.index_in(cells, value_set=pyarrow.array(values, type=cells.type))
    return tuple(map(str, values)), places.fill_null(-1).to_numpy().astype(np.int64)
