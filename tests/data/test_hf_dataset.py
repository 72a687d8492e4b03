"""Tables by `datasets`, from local files and from a (local) Hub by the real client: columns, splits, access."""

import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from helpers.hub_server import READ_TOKEN, Blob, HubServer, Repo
from helpers.images import encoded
from helpers.loading import eval_batches
from helpers.sources import as_parquet
from huggingface_hub import constants
from PIL import Image

from resnet_in1k.data.decode import read_image
from resnet_in1k.data.hf_dataset import FORM
from resnet_in1k.data.registry import open_source, open_train_and_val
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


def refused(data: str, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        open_source(data, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert open_source(f"{data}::train", "val").labels.tolist() == [0, 1, 1]  # for evaluation


def test_imagenets_classes_are_named_as_its_folders(tmp_path: Path):
    """The dataset on the Hub names them by synonyms."""
    known = names_by_wnid()
    feature = datasets.ClassLabel(names=[f"{name}, {number}" for number, name in enumerate(known.values())])
    data = write_table(tmp_path, kind=(feature, [7, 8, 9]))
    assert open_source(data, "train").class_names == tuple(known)


def test_one_of_two_columns_of_labels_can_be_named(tmp_path: Path):
    """As CIFAR-100 has them."""
    data = write_table(tmp_path, second=(datasets.ClassLabel(names=["x", "y", "z"]), [2, 0, 2]))
    source = open_source(f"{data}:::second", "train")
    assert (source.class_names, source.labels.tolist()) == (("x", "y", "z"), [2, 0, 2])
    for column in ("picture", "nothing"):
        expected = f"{column} is not a column of labels; the columns: picture (Image), kind (ClassLabel)"
        assert expected in refused(f"{data}:::{column}")


def test_a_column_of_names_or_numbers_can_be_named(tmp_path: Path):
    """The classes are those of all splits."""
    for kind, of_train, of_test, class_names in (
        ("string", ["dog", "cat", "dog"], ["ox", "dog", "cat"], ("cat", "dog", "ox")),
        ("int64", [10, 9, 10], [11, 10, 9], ("9", "10", "11")),
    ):
        write_table(tmp_path / kind, "train", other=(datasets.Value(kind), of_train))
        data = write_table(tmp_path / kind, "test", other=(datasets.Value(kind), of_test))
        train, val = open_train_and_val(f"{data}:::other")
        assert train.class_names == val.class_names == class_names
        assert (train.labels.tolist(), val.labels.tolist()) == ([1, 0, 1], [2, 1, 0])


@pytest.mark.parametrize("kind", ["bytes and path", "bytes", "large", "paths"])
def test_parquet_by_pandas_has_images_and_the_only_other_column_is_the_label(tmp_path: Path, kind: str, monkeypatch):
    """The folder may be named like a reader of `datasets`."""
    pictures = [encoded(Image.new("RGB", (9, 9), (number, 0, 0)), format="PNG").tobytes() for number in range(3)]
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, content in zip(files, pictures, strict=True):
        Path(path).write_bytes(content)
    cells = {
        "bytes and path": [{"bytes": each, "path": "x.png"} for each in pictures],
        "bytes": pictures,
        "large": pyarrow.array(pictures, type=pyarrow.large_binary()),
        "paths": files,
    }
    (tmp_path / "parquet").mkdir()
    columns = {"animal": ["cat", "ant", "cat"], "picture": cells[kind]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "parquet/train.parquet")
    monkeypatch.chdir(tmp_path)
    source = open_source("hf:parquet", "train")
    assert (source.class_names, source.labels.tolist()) == (("ant", "cat"), [1, 0, 1])
    assert [source.read(index).tobytes() for index in range(3)] == pictures


def test_a_column_with_a_value_for_each_image_is_no_label(tmp_path: Path):
    write_table(tmp_path, caption=(datasets.Value("string"), ["a cat", "cats", "my cat"]))
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet").select(["picture", "caption"])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert "caption has 3 values; name the column of labels: hf:NAME:" in refused(f"hf:{tmp_path}")
    assert len(open_source(f"hf:{tmp_path}:::caption", "train").class_names) == 3


def test_what_cannot_be_used_is_one_line(tmp_path: Path):
    images = write_table(tmp_path / "a", second=(datasets.Image(), [None] * 3))
    labels = write_table(tmp_path / "b", second=(datasets.ClassLabel(names=["x"]), [0] * 3))
    for data, message in (
        (images, "2 columns of images, need one; the columns: picture (Image), kind (ClassLabel), second (Image)"),
        (labels, f"2 columns of ClassLabel; name one: {FORM}; the columns: picture (Image)"),
        (write_table(tmp_path / "c", labels=(0, None, -1)), "2 of 3 images in train have no label"),
        (f"hf:{tmp_path}/nowhere", "cannot be loaded (FileNotFoundError: "),
        (f"{images}::train", f"names one split; name two: {FORM}, or give --val-share"),
    ):
        assert message in refused(data)
    data = write_table(tmp_path / "d")
    expected = f"no split named validation or val or valid or test, but train; name them: {FORM}, or give --val-share"
    assert expected in refused(data, "val")


def test_an_image_without_bytes_is_named(tmp_path: Path):
    source = open_source(write_table(tmp_path, picture=(datasets.Image(decode=False), [None] * 3)), "train")
    with pytest.raises(ProcessError, match=r"train\[0\] has no bytes in the table"):
        read_image(source, 0, "fail", {})


def test_a_folder_of_images_by_datasets_own_reader(image_folder: Path, tmp_path: Path):
    """Its table has paths instead of bytes; a file that was removed since is named."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    class_folders = sorted((folder / "val").iterdir())
    source = open_source(f"hf:{folder}", "val")
    for index, label in enumerate(source.labels):
        assert source.read(index).tobytes() in [path.read_bytes() for path in class_folders[label].iterdir()]
    (folder / "val/fox/1.jpg").unlink()
    with pytest.raises(ProcessError, match=r"val/fox/1\.jpg.* cannot be read from its disk: "):
        eval_batches(source)


def test_a_table_stays_in_its_file(image_folder: Path, tmp_path: Path):
    """It is mapped, and pickled as the place of the file."""
    source = open_source(as_parquet(image_folder, tmp_path), "train")
    assert len(pickle.dumps(source)) < sum(len(source.read(index)) for index in range(len(source)))


NAME = "someone/animals"


@pytest.fixture
def animals(image_folder: Path, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Repo:
    """The images of the folder as a public dataset; the client has no token."""
    tables = tmp_path / "tables"
    as_parquet(image_folder, tables)
    files = {str(path.relative_to(tables)): Blob(path.read_bytes(), lfs=True) for path in tables.rglob("*.parquet")}
    repo = hub.repos[NAME] = Repo(private=False)
    repo.add("main", "images", files)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN")
    return repo


def test_a_dataset_of_the_hub_has_the_images_of_its_folder_also_offline(
    animals: Repo, image_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    expected, nowhere = open_train_and_val(str(image_folder)), "http://127.0.0.1:9"  # a port on which nothing listens
    for _ in range(2):
        for source, folder in zip(open_train_and_val(f"hf:{NAME}"), expected, strict=True):
            assert np.array_equal(source.labels, folder.labels)
            for index in range(len(folder)):
                assert source.read(index).tobytes() == folder.read(index).tobytes()
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", nowhere)
        monkeypatch.setattr(constants, "ENDPOINT", nowhere)
        url = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    error = refused("hf:someone/others")
    assert "hf:someone/others cannot be loaded (ConnectionError: Couldn't reach 'someone/others' on the Hub" in error
    assert error.endswith("without a network, only datasets in this machine's HF_HOME can be read")


def test_a_gated_dataset_needs_its_terms_accepted(animals: Repo, monkeypatch: pytest.MonkeyPatch):
    animals.gated = True
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert refused(f"hf:{NAME}").endswith(f"a gated one its terms accepted at https://huggingface.co/datasets/{NAME}")
    animals.accepted_by.add("me")
    assert len(open_source(f"hf:{NAME}", "train")) == 37


def test_a_missing_dataset_and_a_private_one_look_alike(animals: Repo):
    animals.private = True
    for name in (NAME, "someone/nothing"):
        error = refused(f"hf:{name}")
        assert f"Dataset '{name}' doesn't exist on the Hub or cannot be accessed" in error
        assert "; check the name; a private one needs `hf auth login`" in error
