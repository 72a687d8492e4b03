"""The listing of a folder that is kept: used while nothing has changed, and never after."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_in1k.data import image_folder as folder_source
from resnet_in1k.data import listing
from resnet_in1k.data.registry import open_source, open_train_and_val


@pytest.fixture
def kept(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images whose listing is kept, as if it had been there for long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "SETTLED_AFTER_SECONDS", -60.0)
    copied = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (copied / "train/ant/deep/er").mkdir(parents=True)
    shutil.copy(copied / "train/ant/0.jpg", copied / "train/ant/deep/er/z.jpg")
    (copied / "train/ant/notes.txt").write_text("no image")
    open_source(str(copied), "train")
    assert len(list((tmp_path / "cache/resnet_in1k").iterdir())) == 1
    return copied


def forbid_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_source, "_list", None)


def test_a_folder_is_listed_once(kept: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "_read", lambda file, folder: None)
    anew = open_source(str(kept), "train")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept.parent / "cache"))
    forbid_listing(monkeypatch)
    again = open_source(str(kept), "train")
    assert again.fingerprint() == anew.fingerprint()
    assert (again.class_names, again.note) == (anew.class_names, anew.note)
    assert again.labels.tolist() == anew.labels.tolist()
    assert [again.image_name(index) for index in range(len(again))] == [
        anew.image_name(index) for index in range(len(anew))
    ]
    assert again.note.endswith("ant/notes.txt")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new image": lambda train: shutil.copy(train / "ant/0.jpg", train / "bee/new.jpg"),
    "an image less": lambda train: (train / "cat/0.jpg").unlink(),
    "another name": lambda train: (train / "dog/0.jpg").rename(train / "dog/renamed.jpg"),
    "moved to another class": lambda train: (train / "dog/0.jpg").rename(train / "eel/moved.jpg"),
    "a new class": lambda train: shutil.copytree(train / "ant", train / "gnu"),
    "a class less": lambda train: shutil.rmtree(train / "fox"),
    "deep inside": lambda train: shutil.copy(train / "ant/0.jpg", train / "ant/deep/er/y.jpg"),
    "another folder of that name": lambda train: (
        (train / "ant").rename(train.parent / "away"),
        shutil.copytree(train / "bee", train / "ant"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(kept: Path, name: str):
    before = open_source(str(kept), "train").fingerprint()
    CHANGES[name](kept / "train")
    changed = open_source(str(kept), "train")
    found = {str(path) for path in (kept / "train").rglob("*.jpg")}
    assert {changed.image_name(index) for index in range(len(changed))} == found
    assert changed.fingerprint() != before


def test_what_changed_a_moment_ago_is_not_kept(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file system's clock may not tell two changes within a tick from one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copied = Path(shutil.copytree(image_folder, tmp_path / "images"))
    open_train_and_val(str(copied))
    assert not (tmp_path / "cache").exists()


def test_what_changes_while_it_is_listed_is_not_kept(kept: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the file system's clock says: an image that comes after its folder was read would be missed for good."""
    shutil.rmtree(kept.parent / "cache")
    real = folder_source.images_below

    def slow(folder: Path, prefix: str, ignored: list[str], folders: dict) -> list[str]:
        images = real(folder, prefix, ignored, folders)
        if prefix == "bee":
            shutil.copy(kept / "train/bee/0.jpg", kept / "train/bee/late.jpg")
        return images

    monkeypatch.setattr(folder_source, "images_below", slow)
    before = len(open_source(str(kept), "train"))
    monkeypatch.setattr(folder_source, "images_below", real)
    assert len(open_source(str(kept), "train")) == before + 1


def test_without_a_home_nothing_is_kept(image_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """As for the user of a container who is in no list of users."""
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(listing, "SETTLED_AFTER_SECONDS", -60.0)
    train, _ = open_train_and_val(str(image_folder), rescan=True)
    assert len(train) == 37


def test_a_damaged_listing_is_made_anew(kept: Path):
    before = open_source(str(kept), "train").fingerprint()
    (file,) = (kept.parent / "cache/resnet_in1k").iterdir()
    for content in (b"", b"no listing", file.read_bytes()[:700]):
        file.write_bytes(content)
        assert open_source(str(kept), "train").fingerprint() == before
    assert file.stat().st_size > 700


def test_rescan_lists_anew(kept: Path, monkeypatch: pytest.MonkeyPatch):
    open_train_and_val(str(kept))
    real, calls = folder_source._list, []
    monkeypatch.setattr(folder_source, "_list", lambda folder: calls.append(folder) or real(folder))
    open_train_and_val(str(kept))
    assert calls == []
    open_train_and_val(str(kept), rescan=True)
    assert calls == [kept / "train", kept / "val"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(listing, "SETTLED_AFTER_SECONDS", -60.0)
    assert len(open_source(str(image_folder), "train")) == 37
