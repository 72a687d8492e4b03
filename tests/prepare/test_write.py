"""Folders and shards written from any source: complete or absent, continued, never two images in one file."""

import errno
import os
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.preparing import prepare_from

from resnet_in1k.data.image_folder import FileSource
from resnet_in1k.data.registry import open_source
from resnet_in1k.prepare import write
from resnet_in1k.prepare.write import key_of, write_folder, write_shards
from resnet_in1k.utils.errors import UserError


@pytest.fixture
def source(image_folder: Path) -> FileSource:
    """37 images in six classes of seven or six."""
    return open_source(str(image_folder), "train")


def images_in(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]


def originals(source: FileSource) -> list[bytes]:
    return [source.read(index).tobytes() for index in range(len(source))]


def test_a_complete_class_is_not_written_again(source: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[bytes] = []

    def written_bytes(source: FileSource, index: int, *_: object) -> bytes:
        if len(written) == stops_after:
            raise UserError("the disk is full")
        written.append(source.read(index).tobytes())
        return written[-1] + b"!"

    monkeypatch.setattr(write, "written_bytes", written_bytes)
    monkeypatch.setattr(write, "SYNC_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(write, "IMAGES_PER_JOB", 2)
    stops_after = 22
    with pytest.raises(UserError, match="the disk is full"):
        write_folder(source, tmp_path / "train", 1, resize_to=32)
    names = {path.name for path in (tmp_path / "train").iterdir()}
    assert {re.sub(r"(?<=partial).*", "", name) for name in names} == {".plan.json", "ant", "bee", "cat", ".partial"}
    with pytest.raises(UserError, match=r"train is incomplete: rerun the prepare_data\.py command"):
        open_source(str(tmp_path), "train")
    next(tmp_path.glob("train/.partial.*/dog/0.jpg")).write_bytes(b"")  # lost by a power cut
    written.clear()
    stops_after = 99
    write_folder(source, tmp_path / "train", 1, resize_to=32)
    assert written == originals(source)[19:]
    assert images_in(tmp_path / "train") == [image + b"!" for image in originals(source)]
    assert {path.name for path in (tmp_path / "train").iterdir()} == {".plan.json", *source.class_names}


def test_classes_get_their_names_after_a_sync(source: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One sync for all of 30 seconds."""
    happened, rename = list[str](), os.rename
    monkeypatch.setattr(os, "sync", lambda: happened.append("sync"))
    monkeypatch.setattr(os, "rename", lambda old, new: (happened.append(Path(new).name), rename(old, new)))
    write_folder(source, tmp_path / "train", 1)
    assert happened == ["sync", *source.class_names]


def test_files_are_copied_where_they_cannot_be_linked(
    source: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Never into the original, even if a link was made in spite of an error; a transient error is retried."""
    link, write_bytes, errors = os.link, Path.write_bytes, [OSError(errno.EIO, "Input/output error")]

    def failing_link(original: Path, target: Path) -> None:
        link(original, target)
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def write_image(path: Path, data: bytes) -> int:
        if path.suffix == ".jpg" and errors:
            raise errors.pop()
        return write_bytes(path, data)

    monkeypatch.setattr(os, "link", failing_link)
    monkeypatch.setattr(Path, "write_bytes", write_image)
    source = replace(source, class_names=("a class without images", *source.class_names), labels=source.labels + 1)
    write_folder(source, tmp_path / "train", 1)
    assert images_in(tmp_path / "train") == originals(source)
    assert all(path.stat().st_nlink == 1 for path in tmp_path.rglob("*.jpg"))
    assert not errors


def test_two_classes_are_never_one_folder(source: FileSource, tmp_path: Path):
    """Checked before anything is written."""
    for name in ("bee", "..", "a/b", ""):
        unusual = replace(source, class_names=(name, *source.class_names[1:]))
        with pytest.raises(UserError, match=f"class '{name}' is there twice or cannot name a folder; write --shards"):
            write_folder(unusual, tmp_path / "train", 1)
        assert not (tmp_path / "train").exists()
    write_shards(unusual, tmp_path / "shards/train", 20_000, 1)


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", refused)


def test_a_second_run_on_the_same_folder_is_refused(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    refuse_locks(monkeypatch, errno.EAGAIN)
    with pytest.raises(UserError, match="out is being written to by another process; wait for it or stop it"):
        prepare_from(image_folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_an_interrupted_run_continues_to_the_same_bytes(source: FileSource, tmp_path: Path):
    """By one process, by two, and after a shard was lost; an incomplete one has another name."""
    one, two = tmp_path / "one/train", tmp_path / "two/train"
    write_shards(source, one, 20_000, 1)
    write_shards(source, two, 20_000, 2)
    complete = {path.name: path.read_bytes() for path in one.glob("*.tar")}
    times = {path: path.stat().st_mtime_ns for path in two.glob("*.tar")}
    (two / "shard-000001.tar").unlink()
    (two / ".partial.1").mkdir()
    (two / ".partial.1/shard-000001.tar").write_bytes(b"half")
    write_shards(source, two, 20_000, 1)
    assert {path.name: path.read_bytes() for path in two.glob("*.tar")} == complete
    for path, time in times.items():
        assert (path.stat().st_mtime_ns == time) == (path.name != "shard-000001.tar")


def test_other_images_or_sizes_are_not_mixed(image_folder: Path, source: FileSource, tmp_path: Path):
    """Images of another size have the same names, and may have the same number of bytes."""
    other = Path(shutil.copytree(image_folder, tmp_path / "images"))
    for path in (other / "train").rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-3] + b"abc")
    changed = open_source(str(other), "train")
    write_shards(source, tmp_path / "shards/train", 20_000, 1)
    write_folder(source, tmp_path / "folder", 1)
    for action in (
        lambda: write_shards(source, tmp_path / "shards/train", 40_000, 1),
        lambda: write_shards(changed, tmp_path / "shards/train", 20_000, 1),
        lambda: write_folder(changed, tmp_path / "folder", 1),
        lambda: write_folder(source, tmp_path / "folder", 1, resize_to=32),
    ):
        with pytest.raises(UserError, match="has other files, other images or images of another size; choose"):
            action()


def test_files_of_others_are_left_alone(source: FileSource, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/shard-000000.tar").write_bytes(b"mine")
    for action in (
        lambda: write_shards(source, tmp_path / "mine", 20_000, 1),
        lambda: write_folder(source, tmp_path / "mine", 1),
    ):
        with pytest.raises(UserError, match="has other files, other images or images of another size; choose"):
            action()
    (tmp_path / "classes.json").write_text('["mine"]')
    with pytest.raises(UserError, match=r"classes\.json is of other images; choose another folder, or remove it"):
        write_shards(source, tmp_path / "new", 20_000, 1)


def test_long_names_of_any_letters_fit_into_a_tar_file():
    """A name in the USTAR format has 100 bytes; a Chinese character takes three."""
    for name in ("data/" + "猫" * 80 + "/" + "图" * 80 + ".jpg", "x" * 300 + "/y.jpg"):
        key = key_of(7, name)
        assert key.startswith("00000007_")
        assert 80 < len(key.encode()) <= 90
        tarfile.TarInfo(f"{key}.jpg").tobuf(tarfile.USTAR_FORMAT)
