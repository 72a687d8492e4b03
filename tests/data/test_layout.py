"""Folders as people have them: names of splits, one level too deep or too high, leftovers; and advice that works."""

import io
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import check_several_classes, open_source, open_train_and_val
from resnet_in1k.utils.errors import UserError


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder `data`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    return Path("data")


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, format="JPEG")
    return file.getvalue()


def classes(*folders: str, names: str = "cat dog") -> list[str]:
    """Three images of each class in each folder."""
    return [f"{folder}/{name}/{number}.jpg" for folder in folders for name in names.split() for number in range(3)]


def write(*names: str) -> None:
    for name in names:
        path = Path("data", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture() if path.suffix == ".jpg" else b"something else")


def keys(source: Source) -> set[str]:
    return {os.path.relpath(source.image_name(index), "data") for index in range(len(source))}


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "valid"),
        ("train", "validation"),
        ("Train", "Val"),
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train/images", "val/images"),
    ],
)
def test_splits_have_many_names(train: str, val: str):
    write(*classes(train, val))
    sources = open_train_and_val("data")
    assert list(map(keys, sources)) == [set(classes(train)), set(classes(val))]
    assert [source.class_names for source in sources] == [("cat", "dog")] * 2
    tested = "test" in val.lower()
    assert sources[1].note.startswith("validation is on the folder") == tested
    assert f"classes are the folders in {Path('data', train)}" in sources[0].note or "/" not in train


@pytest.mark.parametrize("split", ["test", "TEST", "valid", "val", "Validation", "train", "holdout"])
def test_any_split_of_a_folder_can_be_evaluated(split: str):
    """Also of a run that holds out a share of the training images."""
    write(*classes("train", "valid", "Test", "Holdout"))
    folder = {"test": "Test", "val": "valid", "validation": "valid", "holdout": "Holdout"}
    expected = set(classes(folder.get(split.lower(), split)))
    assert keys(open_source("data", split)) == expected
    if split.lower() in ("test", "holdout"):
        assert keys(open_source("data", split, val_share=0.3)) == expected


def test_a_split_that_is_not_there_is_named():
    write(*classes("train", "valid"))
    with pytest.raises(UserError, match="data/test: no such folder; the folders there are train, valid"):
        open_source("data", "test")
    with pytest.raises(UserError, match="--data digits has no split test, but train and val"):
        open_source("digits", "test")


def test_a_test_split_is_no_validation_split_of_val_share():
    write(*classes("Training", "Testing"))
    assert set.union(*map(keys, open_train_and_val("data", 0.3))) == set(classes("Training"))


def test_folders_with_images_next_to_classes_are_classes_whatever_their_names():
    write(*classes(".", names="bus train test"))
    assert open_train_and_val("data", 0.3)[0].class_names == ("bus", "test", "train")


def cured(message: str, data: str) -> tuple[Source, Source]:
    """Do what a refusal says: run its command, or give the flags that it names."""
    if command := re.search(r"(?:unpack|by a table): (.*done)", message):
        subprocess.run(["bash", "-c", command[1]], check=True)
        return open_train_and_val(data)
    words = shlex.split(re.search(r"--data \S+( --val-share [\d.]+)?", message)[0])
    return open_train_and_val(words[1], float([*words, "", "0"][3]))


@pytest.mark.parametrize(
    ("images", "given", "val_share", "reason"),
    [
        (classes("PetImages"), "data", 0.3, "one class only, PetImages"),
        (classes("set/train", "set/val"), "data", 0, "data/train: no such folder"),
        (classes("set/train", "set/val"), "data", 0.3, "set cannot be classes"),
        (classes("a/train", "a/val", "b/train", "b/val"), "data", 0.3, "a, b cannot be classes"),
        (classes("valid", "test"), "data", 0.3, "test, valid cannot be classes"),
        (classes("train", "val"), "data/train", 0, "data/train/train: no such folder"),
        (classes("."), "data", 0, "data/train: no such folder"),
        (classes("."), "data/cat", 0.3, "files must be in a folder named for their class"),
        (classes("train"), "data", 0, "data/val: no such folder"),
        (classes("train/images"), "data", 0.3, "one class only, images"),
        ([*classes("train"), "val/a.jpg", "val/b.jpg"], "data", 0, "files must be in a folder named for their class"),
        ([*classes("train/n1/images", "train/n2/images"), "val/images/a.jpg"], "data", 0, "only in val: images"),
        ([*classes("train"), *classes("val", names="cat")], "data", 0, "only in train: dog"),
    ],
)
def test_a_refusal_names_what_fits(images: list[str], given: str, val_share: float, reason: str):
    write(*images)
    with pytest.raises(UserError, match=reason) as refused:
        open_train_and_val(given, val_share)
    assert "\n" not in str(refused.value)
    train, val = cured(str(refused.value), "data")
    assert len(train.class_names) >= 2
    assert set(train.labels) == set(val.labels)


def test_either_cure_for_val_share_where_there_is_a_val_split_works():
    write(*classes("train", "valid"))
    with pytest.raises(UserError, match=r"data has a val split; omit --val-share, or give --data data/train$"):
        open_train_and_val("data", 0.3)
    assert len(open_train_and_val("data")[0]) > len(open_train_and_val("data/train", 0.3)[0])


def test_one_class_is_refused_where_no_other_folder_fits():
    write(*classes("train", "val", names="cat"))
    for check in (lambda: open_train_and_val("data"), lambda: check_several_classes(open_source("data", "val"))):
        with pytest.raises(UserError, match="data: one class only, cat; at least two are needed"):
            check()


def test_archives_are_unpacked_by_the_command_of_the_message():
    write(*classes("train", "val"))
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for name in classes("train", "val"):
            archive.write(Path("data", name), name)
    for open_it in (lambda: open_source("photos.zip", "train"), lambda: open_source("photos.zip", "train", 0.3)):
        with pytest.raises(UserError, match=r"^photos\.zip is a file, not a folder; unpack: for f in ") as refused:
            open_it()
    assert len(cured(str(refused.value), "photos")[0]) == 6

    for folder in [path for split in ("train", "val") for path in Path("data", split).iterdir()]:
        with tarfile.open(f"{folder}.tar", "w") as archive:
            for image in folder.iterdir():
                archive.add(image, image.name)
        shutil.rmtree(folder)
    for _ in range(2):
        with pytest.raises(UserError, match="no class folders in it; unpack: ") as refused:
            open_train_and_val("data")
        subprocess.run(["bash", "-c", re.search("unpack: (.*done)", str(refused.value))[1]], check=True)
    assert list(map(keys, open_train_and_val("data"))) == [set(classes("train")), set(classes("val"))]


@pytest.mark.parametrize("suffix", [".jpg", ""])
def test_a_table_of_labels_moves_images_to_their_classes(suffix: str):
    """As Kaggle has them; the names with or without suffix."""
    rows = {str(number): "a dog" if number % 2 else "cat" for number in range(8)}
    write(*(f"train/{name}.jpg" for name in rows))
    Path("data/a_submission.csv").write_text("id,breed\n9,cat\n")
    table = "".join(f'{name}{suffix},"{kind}"\r\n' for name, kind in rows.items())
    Path("data/labels.csv").write_text("id,breed\r\n" + table)
    with pytest.raises(UserError, match="move them by a table: ") as refused:
        open_source("data", "train")
    subprocess.run(["bash", "-c", str(refused.value).partition("a table: ")[2]], check=True)
    train, val = open_train_and_val("data", 0.3)
    found = {Path(name) for source in (train, val) for name in keys(source)}
    assert found == {Path("train", kind, f"{name}.jpg") for name, kind in rows.items()}


def test_leftovers_are_passed_over_and_reported():
    leftovers = ["@eaDir/x.jpg", "cat/@eaDir/0.jpg/SYNO.jpg", "cat/._0.jpg", ".ipynb_checkpoints/a.jpg", "Thumbs.db"]
    leftovers += ["__MACOSX/cat/._0.jpg", "#recycle/b.jpg", "lost+found/c.jpg", "dog/desktop.ini"]
    write(*classes("train", "val"), *(f"train/{name}" for name in leftovers), "train/LICENSE", "train/cat/.DS_Store")
    train, val = open_train_and_val("data")
    assert (keys(train), val.note) == (set(classes("train")), "")
    passed_over, ignored = train.note.split("; ")
    assert passed_over.endswith("left by other programs: #recycle, .ipynb_checkpoints, @eaDir and 6 more")
    assert ignored.endswith("not images by name or content: LICENSE")


def test_photographs_that_are_not_decoded_are_counted():
    write(*classes("train", "val"), "train/cat/a.HEIC", "train/cat/b.heic", "train/dog/c.jxl", "train/dog/d.nef")
    expected = "photographs that cannot be decoded (2 HEIC, 1 JPEG XL, 1 camera raw): cat/a.HEIC, cat/b.heic, dog/c.jxl"
    assert expected in open_source("data", "train").note
    write("train/eel/a.heic")
    with pytest.raises(UserError, match=r"no images in data/train of eel; .*\(3 HEIC, .* or for HEIC `pip install"):
        open_source("data", "train")
    Image.new("RGB", (9, 9)).save("data/train/eel/a.jpg")  # the advice: convert to JPEG
    assert "eel" in open_source("data", "train").class_names


def test_a_class_may_have_no_validation_images_if_its_folder_is_empty():
    write(*classes("train", "val"), *classes("train", names="eel fox"))
    with pytest.raises(UserError, match="only in train: eel, fox; add or remove"):
        open_train_and_val("data")
    for name in ("eel", "fox"):
        Path("data/val", name).mkdir()
    train, val = open_train_and_val("data")
    assert train.class_names == val.class_names == ("cat", "dog", "eel", "fox")
    assert val.note == "no images in data/val of eel, fox"


def test_all_classes_with_one_image_are_named_at_once():
    write(*classes("."), "eel/1.jpg", "fox/1.jpg")
    with pytest.raises(UserError, match="--val-share: one image only of eel, fox; add images, or remove these classes"):
        open_train_and_val("data", 0.3)
    for name in ("eel", "fox"):
        shutil.rmtree(Path("data", name))
    assert open_train_and_val("data", 0.3)[0].class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ({"train/cat/up": ".."}, "train/cat/up is a link to a folder that it is in; remove the link"),
        ({"train/cat/x": "../dog", "train/dog/y": "../cat"}, "train/cat/x/y is a link to a folder that it is in"),
        ({"train/cat/x": "x"}, "train/cat/x cannot be read: Too many levels"),
        ({"train/cat/a.jpg": "gone.jpg"}, "data/train: links to missing files, 1 image: cat/a.jpg"),
    ],
)
def test_links_that_lead_nowhere_or_in_a_circle_are_one_short_line(links: dict[str, str], message: str):
    write(*classes("train", "val"))
    for name, target in links.items():
        Path("data", name).symlink_to(target)
    with pytest.raises(UserError, match=message) as refused:
        open_train_and_val("data")
    assert len(str(refused.value)) < 150
    for name in links:
        Path("data", name).unlink()
    open_train_and_val("data")
