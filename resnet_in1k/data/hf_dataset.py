"""`hf:NAME[:CONFIG[:TRAIN,VAL[:LABEL]]]`: a dataset of the Hub, or a local folder of parquet files, by `datasets`.

The table is memory-mapped, and images stay encoded: they are decoded and augmented like files.
"""

import errno
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_in1k.data.dataset import PackedBytes, Source, SourceFacts, Split, fingerprint_of
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line, shorten
from resnet_in1k.utils.imagenet import wnids_of

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("validation", "val", "valid", "test")}
"""Names of the splits on the Hub, in order of preference."""
FORM = "hf:NAME:CONFIG:TRAIN,VAL:LABEL (parts can be empty)"


@dataclass(frozen=True, kw_only=True)
class TableSource(Source):
    """A column of encoded images and one of labels. Its keys are row numbers: images in a table may have no names."""

    table: Any
    """A `datasets.Dataset` with the column of images, which pickles as the paths of its files."""

    def _image(self, index: int) -> Any:
        return self.table.data[0][int(self.keys[index])]

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
        for chunk in self.table.data[0].chunks:
            sizes = pyarrow.compute.binary_length(chunk.field("bytes"))
            arrays.append(sizes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64))
            if sizes.null_count:  # images that are files
                names = "\0".join(Path(path or "").name for path in chunk.field("path").to_pylist())
                arrays.append(np.frombuffer(names.encode("utf-8", "surrogateescape"), dtype=np.uint8))
        return fingerprint_of(self.class_names, *arrays)


def _parse(data: str) -> list[str]:
    """Return name, config, splits and label, the parts of FORM; "" for one that is not given."""
    return [*data.removeprefix("hf:").split(":", 3), "", "", ""][:4]


def facts(data: str) -> SourceFacts:
    name, limits = _parse(data)[0], "See the page of the dataset for who took the training images, where, and of what."
    if Path(name).exists():
        rest, name = data.removeprefix(f"hf:{name}"), Path(name).name
        data = f"hf:path/to/{name}{rest}"
    return SourceFacts(name, shlex.quote(data), limits)


def open_split(data: str, split: Split) -> TableSource:
    """Raise UserError if there is no such dataset, access is denied, or it has no images with labels."""
    _, _, splits, _ = _parse(data)
    named = splits.split(",") if splits else []
    if split == "train" and len(named) == 1:
        raise UserError(f"--data {data} names one split; name two: {FORM}, or give --val-share")
    wanted = SPLIT_NAMES.get(split, (split,))
    if named and split in SPLIT_NAMES:
        wanted = (named[0 if split == "train" else -1],)
    return _open(data, split, _load(data), wanted)


def open_whole(data: str) -> TableSource:
    """Open the training split, or the named split; raises UserError if there is a val split."""
    tables, (_, _, splits, _) = _load(data), _parse(data)
    train, _, val = splits.partition(",")
    if not train:
        val = next((name for name in SPLIT_NAMES["val"] if name in tables), "")
    if val:
        raise UserError(f"--val-share: {data} has a val split, {val}; omit --val-share, or name one split: {FORM}")
    return _open(data, "train", tables, (train,) if train else SPLIT_NAMES["train"])


def _load(data: str) -> Any:
    """Return a `datasets.DatasetDict`."""
    import datasets

    (name, config, *_), advice = _parse(data), ""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # each update would be a line of the log
    try:
        # The absolute path of a folder: a relative one may be the name of a reader, such as csv or parquet.
        return datasets.load_dataset(str(Path(name).absolute()) if Path(name).is_dir() else name, config or None)
    except Exception as error:  # the client, the file formats and the disk share no base class of errors
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            page = f"https://huggingface.co/datasets/{name}"
            advice = f"; check the name; a private one needs `hf auth login`, a gated one its terms accepted at {page}"
        elif isinstance(error, ConnectionError):
            advice = "; without a network, only datasets in this machine's HF_HOME can be read"
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--data {data} cannot be loaded ({reason}){advice}") from None


def _open(data: str, split: Split, tables: Any, wanted: tuple[str, ...]) -> TableSource:
    """Open the first split of `wanted` that a `datasets.DatasetDict` has."""
    import datasets

    found = next((name for name in wanted if name in tables), None)
    if found is None:
        missing = f"no split named {' or '.join(wanted)}, but {', '.join(tables)}"
        raise UserError(f"--data {data}: {missing}; name them: {FORM}{', or give --val-share' * (split == 'val')}")
    table = tables[found]
    image_columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    image_columns = image_columns or [name for name in table.features if _has_files(table, name)]
    if len(image_columns) != 1:
        raise UserError(f"--data {data}: {len(image_columns)} columns of images, need one; {_columns(table)}")
    class_names, labels = _labels(data, table, tables, image_columns[0])
    if len(labels) == 0 or labels.min() < 0:  # -1 is the label of a test split without labels
        unlabeled = int((labels < 0).sum())
        raise UserError(f"--data {data}: {unlabeled:,} of {len(labels):,} images in {found} have no label")
    return TableSource(
        name=data,
        split=split,
        class_names=class_names,
        labels=labels,
        keys=PackedBytes(b"%d" % row for row in range(len(labels))),
        note="validation is on the split test" if found == "test" and wanted == SPLIT_NAMES["val"] else "",
        table=table.select_columns(image_columns).cast_column(image_columns[0], datasets.Image(decode=False)),
    )


def _has_files(table: Any, column: str) -> bool:
    """True for a column of files as pandas and pyarrow write it: bytes, bytes and path, or paths."""
    feature = table.features[column]
    dtype, value = getattr(feature, "dtype", ""), next(iter(table.data.column(column)), None)
    if "string" in dtype and value is not None:
        return Path(value.as_py() or "").is_file()
    return "binary" in dtype or (isinstance(feature, dict) and "bytes" in feature)


def _labels(data: str, table: Any, tables: Any, image_column: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and the labels, (N,) int64, -1 for none, from the named column, the only ClassLabel, or
    the only column next to the images."""
    import datasets
    import pyarrow.compute

    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    *_, named = _parse(data)
    others = [name for name in table.features if name != image_column and not name.startswith("__")]  # pandas' index
    if named or (not columns and len(others) == 1):
        columns = [named or others[0]]
    if len(columns) != 1:
        raise UserError(f"--data {data}: {len(columns)} columns of ClassLabel; name one: {FORM}; {_columns(table)}")
    feature = table.features.get(columns[0])
    dtype = getattr(feature, "dtype", "")
    if dtype not in ("string", "large_string") and "int" not in dtype:
        raise UserError(f"--data {data}: {columns[0]} is not a column of labels; {_columns(table)}")
    cells = table.data.column(columns[0])
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(wnids_of(feature.names) or feature.names)  # ImageNet-1k gets the names of its folders
        return names, cells.fill_null(-1).to_numpy().astype(np.int64)
    # Numbers or names: the classes are the values in all splits, so that labels agree if a split has only some classes.
    values = sorted({value for each in tables.values() for value in each.unique(columns[0]) if value not in (None, -1)})
    if not named and len(values) > max(2, sum(map(len, tables.values())) / 2):  # captions, file names or numbers
        raise UserError(f"--data {data}: {columns[0]} has {len(values):,} values; name the column of labels: {FORM}")
    places = pyarrow.compute.index_in(cells, value_set=pyarrow.array(values, type=cells.type))
    return tuple(map(str, values)), places.fill_null(-1).to_numpy().astype(np.int64)


def _columns(table: Any) -> str:
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    kinds |= {name: feature.dtype for name, feature in table.features.items() if kinds[name] == "Value"}
    return "the columns: " + shorten([f"{name} ({kind})" for name, kind in kinds.items()], 9)
