"""Folders of classes, their cached listing, and lists of image files."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_in1k.data import image_folder as module
from resnet_in1k.data.image_folder import open_paths
from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.utils.errors import UserError


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(image_folder, tmp_path / "images"))


def test_folder_lists_files_by_class(image_folder: Path):
    train, val = open_train_and_val(str(image_folder))
    assert train.class_names == ("ant", "bee", "cat", "dog", "eel", "fox")
    assert (len(train), len(val), train.note) == (37, 12, "")
    assert np.bincount(train.labels).tolist() == [7, 6, 6, 6, 6, 6]
    for source in (train, val):
        for index, label in enumerate(source.labels):
            path = Path(source.image_name(index))
            assert path.parent == image_folder / source.split / source.class_names[label]
            assert source.read(index).tobytes() == path.read_bytes()


def test_a_file_is_an_image_by_its_name_or_by_its_content(folder: Path):
    """At any depth; other files are reported, hidden files are not."""
    picture = Image.open(folder / "train/ant/0.jpg")
    (folder / "train/ant/more").mkdir()
    (folder / "train/.DS_Store").write_text("")
    for name, kind in [("a.JPEG", "PNG"), ("b.png", "WEBP"), ("c.dat", "BMP"), ("more/d", "TIFF"), ("e.JPG", "GIF")]:
        picture.save(folder / "train/ant" / name, format=kind)
    (folder / "train/ant/text.JPEG").write_text("not an image, but named as one")
    (folder / "train/ant/notes").write_text("not an image, nor named as one")
    train = open_source(str(folder), "train")
    names = {Path(train.image_name(index)).name for index in range(7 + 6)}
    assert names == {"text.JPEG", "a.JPEG", "b.png", "c.dat", "d", "e.JPG", *(f"{number}.jpg" for number in range(7))}
    assert train.note.endswith("not images by name or content: ant/notes")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "val"), "val: no such folder"),
        (lambda f: [shutil.rmtree(c) for c in (f / "train").iterdir()], "train: no class folders"),
        (lambda f: (f / "train/gnu").mkdir(), "no images in .*train of gnu; add some, or remove"),
        (lambda f: (f / "val/cat").rename(f / "val/kat"), "only in train: cat; only in val: kat"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        open_train_and_val(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_costs_fifty_bytes(tmp_path: Path):
    """A Python list of such paths takes over 100 bytes each."""
    (tmp_path / "train/n00000000").mkdir(parents=True)
    for number in range(1000):
        (tmp_path / f"train/n00000000/n00000000_{number}.JPEG").touch()
    assert len(pickle.dumps(open_source(str(tmp_path), "train"))) < 50 * 1000


def test_listed_images_are_files_and_those_in_folders_in_the_order_given(image_folder: Path, tmp_path: Path):
    single, folder, gone = image_folder / "val/fox/0.jpg", image_folder / "val/ant", tmp_path / "gone"
    source = open_paths([single, folder, gone])
    expected = [single, folder / "0.jpg", folder / "1.jpg", gone]
    assert [source.image_name(index) for index in range(len(source))] == list(map(str, expected))
    with pytest.raises(UserError, match=f"^{tmp_path}: no images in this folder"):
        open_paths([single, tmp_path])


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cached listing, as if the folder were not new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SETTLED_AFTER_SECONDS", -60.0)
    (folder / "train/ant/deep/er").mkdir(parents=True)
    shutil.copy(folder / "train/ant/0.jpg", folder / "train/ant/deep/er/z.jpg")
    (folder / "train/ant/notes.txt").write_text("not an image")
    open_source(str(folder), "train")
    return folder


def test_a_folder_is_listed_once_and_again_with_rescan(cached: Path, monkeypatch: pytest.MonkeyPatch):
    real, listed = module._list, list[Path]()
    monkeypatch.setattr(module, "_list", lambda folder: (listed.append(folder), real(folder))[1])
    again = open_source(str(cached), "train")
    assert listed == []
    anew, _ = open_train_and_val(str(cached), rescan=True)
    assert listed == [cached / "train", cached / "val"]
    assert again.fingerprint() == anew.fingerprint()
    assert (again.class_names, again.note, again.labels.tolist()) == (anew.class_names, anew.note, anew.labels.tolist())
    assert again.image_name(7) == anew.image_name(7)
    assert again.note.endswith("ant/notes.txt")


def test_a_format_that_is_known_since_is_found(cached: Path, monkeypatch: pytest.MonkeyPatch):
    """Such as HEIC, after pillow-heif is installed."""
    (cached / "train/bee/a.heic").write_bytes(b"")
    assert "1 HEIC" in open_source(str(cached), "train").note
    monkeypatch.setattr(module.formats, "image_formats", lambda: ["JPEG"])
    monkeypatch.setattr(module.formats, "image_suffixes", lambda: (".jpg", ".heic"))
    assert open_source(str(cached), "train").note.endswith("name or content: ant/notes.txt")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new image": lambda train: shutil.copy(train / "ant/0.jpg", train / "bee/new.jpg"),
    "an image less": lambda train: (train / "cat/0.jpg").unlink(),
    "another name": lambda train: (train / "dog/0.jpg").rename(train / "dog/renamed.jpg"),
    "deep inside": lambda train: shutil.copy(train / "ant/0.jpg", train / "ant/deep/er/y.jpg"),
    "another folder of that name": lambda train: (
        (train / "ant").rename(train.parent / "away"),
        shutil.copytree(train / "bee", train / "ant"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(cached: Path, name: str):
    CHANGES[name](cached / "train")
    changed = open_source(str(cached), "train")
    found = {str(path) for path in (cached / "train").rglob("*.jpg")}
    assert {changed.image_name(index) for index in range(len(changed))} == found


def test_what_has_just_changed_is_not_cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two changes within one tick of the file system's clock have the same time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_train_and_val(str(folder))
    assert not (tmp_path / "cache").exists()


def test_what_changes_while_it_is_listed_is_seen_the_next_time(cached: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the file system's clock: an image that is added after its folder was read would be missed forever."""
    shutil.rmtree(cached.parent / "cache")
    real = module.images_below

    def slow(folder: Path, prefix: str, *lists: object) -> list[str]:
        images = real(folder, prefix, *lists)
        if prefix == "bee":
            shutil.copy(cached / "train/bee/0.jpg", cached / "train/bee/late.jpg")
        return images

    monkeypatch.setattr(module, "images_below", slow)
    before = len(open_source(str(cached), "train"))
    monkeypatch.setattr(module, "images_below", real)
    assert len(open_source(str(cached), "train")) == before + 1


def test_without_a_cache_folders_are_listed_each_time(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A home folder that cannot be written to; none at all, as of a container's user."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(module, "SETTLED_AFTER_SECONDS", -60.0)
    assert len(open_source(str(image_folder), "train")) == 37
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert len(open_source(str(image_folder), "train")) == 37
