"""`hf:NAME[:CONFIG[:TRAIN,VAL[:LABEL]]]`: a dataset of the Hub, or a local folder of parquet files, by `datasets`.

The table is memory-mapped, and images stay encoded: they are decoded and augmented like files.
"""

import errno
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_in1k.data.dataset import DivisibleSource, PackedBytes, SourceFacts, Split, fingerprint_of
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line, shorten
from resnet_in1k.utils.imagenet import wnids_of

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("validation", "val", "valid", "test")}
"""Names of the splits on the Hub, in order of preference."""


@dataclass(frozen=True, kw_only=True)
class TableSource(DivisibleSource):
    """A column of encoded images and one of labels. Its keys are row numbers: images in a table may have no names."""

    table: Any
    """A `datasets.Dataset`, which pickles as the paths of its files."""
    image_column: str

    def _image(self, index: int) -> Any:
        return self.table.data.column(self.image_column)[int(self.keys[index])]

    def read(self, index: int) -> np.ndarray:
        image = self._image(index)
        data, path = (image[name] if image.is_valid else None for name in ("bytes", "path"))
        if data is not None and data.is_valid:
            return np.frombuffer(bytearray(data.as_buffer()), dtype=np.uint8)
        if path is None or not path.is_valid:
            raise OSError(errno.ENODATA, f"{self.image_name(index)} has no bytes in the table")
        return np.frombuffer(bytearray(Path(path.as_py()).read_bytes()), dtype=np.uint8)

    def image_name(self, index: int) -> str:
        path = (self._image(index).as_py() or {}).get("path")
        return f"{self.name}/{self.table.split}[{int(self.keys[index])}]" + (f" ({path})" if path else "")

    def fingerprint(self) -> str:
        import pyarrow.compute

        arrays = [self.labels]
        if len(self) < len(self.table):  # a part of the rows
            arrays.append(np.array([int(self.keys[index]) for index in range(len(self))], dtype=np.int64))
        for chunk in self.table.data.column(self.image_column).chunks:
            sizes = pyarrow.compute.binary_length(chunk.field("bytes"))
            arrays.append(sizes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64))
            if sizes.null_count:  # images that are files
                names = "\0".join(Path(path or "").name for path in chunk.field("path").to_pylist())
                arrays.append(np.frombuffer(names.encode("utf-8", "surrogateescape"), dtype=np.uint8))
        return fingerprint_of(self.class_names, *arrays)


class Address(NamedTuple):
    """The parts of `hf:NAME:CONFIG:TRAIN,VAL:LABEL`; "" for a part that is not given."""

    name: str
    config: str = ""
    splits: str = ""
    label: str = ""

    @classmethod
    def parse(cls, data: str) -> "Address":
        return cls(*data.removeprefix("hf:").split(":", 3))

    def __str__(self) -> str:
        return "hf:" + ":".join(self).rstrip(":")


def facts(data: str) -> SourceFacts:
    address = Address.parse(data)
    name, limits = address.name, "Who took the training images, where and of what: see the page of the dataset."
    if Path(name).exists():
        name = Path(name).name
        address = address._replace(name=f"path/to/{name}")
    return SourceFacts(name=name, data_flag=shlex.quote(str(address)), limits=limits)


def open_split(data: str, split: Split) -> TableSource:
    """Raise UserError if there is no such dataset, access is denied, or it has no images with labels."""
    address = Address.parse(data)
    if split == "train" and address.splits and "," not in address.splits:
        both = address._replace(splits=f"{address.splits},VAL")
        raise UserError(f"--data {data} names one split; training needs two: give --data {both}, or --val-share")
    wanted = SPLIT_NAMES[split]
    if address.splits:
        wanted = (address.splits.split(",")[0 if split == "train" else -1],)
    source = _open(data, split, _load(data), wanted)
    is_test = not address.splits and str(source.table.split) == "test"
    return replace(source, note="validation is on the split test") if is_test else source


def open_whole(data: str) -> TableSource:
    """Open the training split, or the named split; raises UserError if there is a val split."""
    address, splits = Address.parse(data), _load(data)
    train, _, val = address.splits.partition(",")
    if not train:
        val = next((name for name in SPLIT_NAMES["val"] if name in splits), "")
    if val:
        named = address._replace(splits=train or "train")
        raise UserError(f"--val-share: {data} has a val split, {val}; omit --val-share, or give --data {named}")
    return _open(data, "train", splits, (train,) if train else SPLIT_NAMES["train"])


def _load(data: str) -> Any:
    """Return a `datasets.DatasetDict`."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    address = Address.parse(data)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # each update would be a line of the log
        print(f"loading {data} through the cache in {datasets.config.HF_DATASETS_CACHE}", file=sys.stderr, flush=True)
    try:
        return datasets.load_dataset(address.name, address.config or None)
    except DatasetNotFoundError as error:
        advice = "check the name; a private or gated dataset needs `hf auth login`"
        if "gated" in str(error):
            advice = f"accept its terms at https://huggingface.co/datasets/{address.name}, then `hf auth login`"
        raise UserError(f"--data {data}: {first_line(error)}; {advice}") from None
    except ConnectionError as error:
        advice = "without a network, only datasets that were downloaded to this machine's HF_HOME can be read"
        raise UserError(f"--data {data} cannot be loaded ({first_line(error)}); {advice}") from None
    except Exception as error:  # the client, the file formats and the disk share no base class of errors
        raise UserError(f"--data {data} cannot be loaded ({type(error).__name__}: {first_line(error)})") from None


def _open(data: str, split: Split, splits: Any, wanted: tuple[str, ...]) -> TableSource:
    """Open the first split of `wanted` that a `datasets.DatasetDict` has."""
    import datasets

    found = next((name for name in wanted if name in splits), None)
    if found is None:
        named = Address.parse(data)._replace(splits="TRAIN,VAL")
        missing = f"no split named {' or '.join(wanted)}, but {', '.join(splits)}"
        raise UserError(f"--data {data}: {missing}; give --data {named}{' or --val-share' * (split == 'val')}")
    table = splits[found]
    image_columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if len(image_columns) != 1:
        raise UserError(f"--data {data}: {len(image_columns)} columns of images, need one; {_columns(table)}")
    class_names, labels = _labels(_label_column(data, table), table, splits)
    if len(labels) == 0 or labels.min() < 0:  # -1 is the label of a test split without labels
        unlabeled = int((labels < 0).sum())
        raise UserError(f"--data {data}: {unlabeled:,} of {len(labels):,} images in {found} have no label")
    table = table.cast_column(image_columns[0], datasets.Image(decode=False))
    keys = PackedBytes(b"%d" % row for row in range(len(labels)))
    columns = {"table": table, "image_column": image_columns[0], "labels": labels, "keys": keys}
    return TableSource(name=data, split=split, class_names=class_names, **columns)


def _label_column(data: str, table: Any) -> str:
    """Return the named column, or the only one of ClassLabel."""
    import datasets

    address = Address.parse(data)
    names = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if address.label:
        dtype = getattr(table.features.get(address.label), "dtype", "")
        if dtype not in ("string", "large_string") and "int" not in dtype:
            raise UserError(f"--data {data}: {address.label} is not a column of labels; {_columns(table)}")
        return address.label
    if len(names) != 1:
        named = address._replace(label="COLUMN")
        raise UserError(f"--data {data}: {len(names)} columns of ClassLabel; name one: {named}; {_columns(table)}")
    return names[0]


def _columns(table: Any) -> str:
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    kinds |= {name: feature.dtype for name, feature in table.features.items() if kinds[name] == "Value"}
    return "the columns: " + shorten([f"{name} ({kind})" for name, kind in kinds.items()], 9)


def _labels(column: str, table: Any, splits: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and the labels, (N,) int64, -1 for none."""
    import datasets
    import pyarrow.compute

    cells, feature = table.data.column(column), table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(wnids_of(feature.names) or feature.names)  # ImageNet-1k gets the names of its folders
        return names, cells.fill_null(-1).to_numpy().astype(np.int64)
    # Numbers or names: the classes are the values in all splits, so that labels agree if a split has only some classes.
    values = sorted({value for each in splits.values() for value in each.unique(column) if value not in (None, -1)})
    places = pyarrow.compute.index_in(cells, value_set=pyarrow.array(values, type=cells.type))
    return tuple(map(str, values)), places.fill_null(-1).to_numpy().astype(np.int64)
