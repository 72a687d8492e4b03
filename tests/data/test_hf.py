"""Tables by `datasets`: which columns and splits are taken, and what is said of those that will not do."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetNotFoundError
from helpers.images import encoded
from helpers.sources import as_parquet
from PIL import Image

from resnet_in1k.data.decode import read_image
from resnet_in1k.data.registry import open_source, open_train_and_val, source_facts
from resnet_in1k.utils.errors import ProcessError, UserError
from resnet_in1k.utils.imagenet import names_by_wnid

CLASSES = ["ant", "bee"]


def write_table(folder: Path, name: str = "train", labels: tuple[int, ...] = (0, 1, 1), **columns: object) -> str:
    pictures = [encoded(Image.new("RGB", (9, 9), (number, 0, 0)), format="PNG").tobytes() for number in range(3)]
    values = {"picture": [{"bytes": picture, "path": None} for picture in pictures], "kind": list(labels)}
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)}
    for column, (feature, cells) in columns.items():
        features[column], values[column] = feature, cells
    table = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(folder / f"{name}.parquet"))
    return f"hf:{folder}"


def test_columns_are_found_by_their_types_and_splits_by_their_names(tmp_path: Path):
    write_table(tmp_path, number=(datasets.Value("int64"), [7, 8, 9]))
    data = write_table(tmp_path, "test", labels=(1, 0, 0))
    train, val = open_train_and_val(data)
    assert train.labels.tolist() == [0, 1, 1]
    assert val.labels.tolist() == [1, 0, 0]
    assert train.class_names == ("ant", "bee")
    assert (train.note, val.note) == ("", "validation is on the split test")
    assert train.image_name(2) == f"{data}/train[2]"
    assert np.array_equal(train.read(1), encoded(Image.new("RGB", (9, 9), (1, 0, 0)), format="PNG"))
    reversed_splits = f"{data}::test,train"
    assert open_source(reversed_splits, "train").labels.tolist() == [1, 0, 0]
    assert open_source(reversed_splits, "val").labels.tolist() == [0, 1, 1]
    assert source_facts(data).name == tmp_path.name
    assert source_facts("hf:ILSVRC/imagenet-1k").data_flag == "hf:ILSVRC/imagenet-1k"


def test_imagenets_classes_are_named_as_its_folders(tmp_path: Path):
    """Its set on the Hub names them by their synonyms: the data are then the same as from folders."""
    known = names_by_wnid()
    feature = datasets.ClassLabel(names=[f"{name}, {number}" for number, name in enumerate(known.values())])
    picture = encoded(Image.new("RGB", (9, 9)), format="PNG").tobytes()
    columns = {"image": [{"bytes": picture, "path": None}], "label": [7]}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train.parquet"))
    assert open_source(f"hf:{tmp_path}", "train").class_names == tuple(known)


def test_a_column_of_labels_can_be_named(tmp_path: Path):
    """One of two of ClassLabel, as CIFAR-100 has; or numbers or names, whose classes are those of all splits."""
    second = (datasets.ClassLabel(names=["x", "y", "z"]), [2, 0, 2])
    data = write_table(tmp_path / "two", second=second)
    source = open_source(f"{data}:::second", "train")
    assert (source.class_names, source.labels.tolist()) == (("x", "y", "z"), [2, 0, 2])
    for name, kind, of_train, of_test, class_names in (
        ("names", "string", ["dog", "cat", "dog"], ["ox", "dog", "cat"], ("cat", "dog", "ox")),
        ("numbers", "int64", [10, 9, 10], [11, 10, 9], ("9", "10", "11")),
    ):
        write_table(tmp_path / name, "train", other=(datasets.Value(kind), of_train))
        write_table(tmp_path / name, "test", other=(datasets.Value(kind), of_test))
        train, val = open_train_and_val(f"hf:{tmp_path / name}:::other")
        assert train.class_names == val.class_names == class_names
        assert (train.labels.tolist(), val.labels.tolist()) == ([1, 0, 1], [2, 1, 0])
    with pytest.raises(
        UserError, match=r"picture is no column of labels; the columns: picture \(Image\), kind \(ClassL"
    ):
        open_source(f"{data}:::picture", "train")
    with pytest.raises(UserError, match=r"nothing is no column of labels; the columns: "):
        open_source(f"{data}:::nothing", "train")
    assert source_facts(f"{data}::a,b:second").data_flag == "hf:path/to/two::a,b:second"


def test_a_missing_label_is_counted(tmp_path: Path):
    with pytest.raises(UserError, match="1 of 3 images in train have no label"):
        open_source(write_table(tmp_path, labels=(0, None, 1)), "train")


def test_what_will_not_do_is_one_line(tmp_path: Path):
    cases = {
        "images": (
            write_table(tmp_path / "a", second=(datasets.Image(), [None] * 3)),
            "2 columns of images, where one",
        ),
        "labels": (
            write_table(tmp_path / "b", second=(datasets.ClassLabel(names=["x"]), [0] * 3)),
            r"2 columns of labels .*: picture \(Image\), kind \(ClassLabel\), .*; name it: hf:/.*/b:::COLUMN$",
        ),
        "unlabeled": (write_table(tmp_path / "c", labels=(0, -1, -1)), "2 of 3 images in train have no label"),
        "split": (write_table(tmp_path / "d", "dev"), r"no split named train, but|no split named train"),
        "file": (f"hf:{tmp_path}/nowhere", "cannot be loaded|doesn't exist|is the name right"),
    }
    for data, message in cases.values():
        with pytest.raises(UserError, match=message) as caught:
            open_source(data, "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no split named validation or val or valid or test, but train; name them: hf:"):
        open_source(write_table(tmp_path / "e"), "val")


def test_sets_that_may_not_be_read_say_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def gated(name: str, config: str | None) -> None:
        raise DatasetNotFoundError(
            f"Dataset '{name}' is a gated dataset on the Hub. You must be authenticated\nto access"
        )

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(
        UserError, match=r"accept its terms at https://huggingface\.co/datasets/a/b, then `hf auth login`"
    ):
        open_source("hf:a/b", "train")

    def offline(name: str, config: str | None) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (offline)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"hf:a/b cannot be loaded \(Couldn't reach .*\); without a network only what"):
        open_source("hf:a/b", "train")


def test_an_image_without_bytes_is_named(tmp_path: Path):
    table = {"picture": [None], "kind": [0]}
    features = datasets.Features({"picture": datasets.Image(decode=False), "kind": datasets.ClassLabel(names=CLASSES)})
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "train.parquet"))
    source = open_source(f"hf:{tmp_path}", "train")
    with pytest.raises(ProcessError, match=r"train\[0\] has no bytes in the table"):
        read_image(source, 0, "fail", {})


def test_a_folder_of_images_by_datasets_own_reader(image_folder: Path):
    """Its table has paths in place of bytes, and its images are sorted otherwise."""
    source, folder = (open_source(data, "val") for data in (f"hf:{image_folder}", str(image_folder)))
    ours = {source.read(index).tobytes(): source.class_names[source.labels[index]] for index in range(len(source))}
    theirs = {folder.read(index).tobytes(): folder.class_names[folder.labels[index]] for index in range(len(folder))}
    assert ours == theirs


def test_a_table_costs_little_memory(image_folder: Path, tmp_path: Path):
    """Images stay in the file, mapped: what is pickled for another process is where they are."""
    import pickle

    source = open_source(as_parquet(image_folder, tmp_path), "train")
    assert len(pickle.dumps(source)) < sum(len(source.read(index)) for index in range(len(source)))
