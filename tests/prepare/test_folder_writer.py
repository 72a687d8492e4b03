"""A folder by class: written by parts, gone on with, and never two images in one file."""

import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from helpers.preparing import contents, prepare
from helpers.sources import SILENT

from resnet_in1k.cli.prepare_data import PrepareOptions
from resnet_in1k.data.dataset import FileSource
from resnet_in1k.data.registry import open_source
from resnet_in1k.prepare import folder_writer
from resnet_in1k.prepare.folder_writer import write_folder
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import FolderLock
from resnet_in1k.utils.pool import Progress


def test_what_is_written_of_a_class_is_not_written_again(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of seven and then six images each, by parts of two; unless the machine was started again in between."""
    monkeypatch.setattr(folder_writer, "IMAGES_PER_PART", 2)
    source = open_source(str(image_folder), "train")
    written: list[bytes] = []
    stops_after = 20

    def change(image: bytes) -> bytes:
        if len(written) == stops_after:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(image)
        return image + b"!"

    def write() -> None:
        write_folder(source, tmp_path / "train", processes=1, progress=SILENT, change=change)

    classes = ["ant", "bee", "cat", "dog", "eel", "fox"]
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write()
    assert names_in(tmp_path / "train") == {".plan.json", *(f".partial.{name}" for name in classes)}
    written.clear()
    stops_after = 9
    with pytest.raises(UserError, match="No space left on device"):
        write()
    assert written == [source.read(index).tobytes() for index in range(19, 28)]  # 19 was of a part that was not whole
    monkeypatch.setattr(folder_writer, "boot_id", lambda: b"another start")
    written.clear()
    stops_after = 99
    write()
    assert len(written) == 37
    assert names_in(tmp_path / "train") == {".plan.json", *classes}
    files = sorted(path for path in (tmp_path / "train").rglob("*") if path.is_file() and path.name != ".plan.json")
    assert [path.read_bytes()[:-1] for path in files] == [source.read(index).tobytes() for index in range(37)]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_classes_get_their_names_once_they_are_on_the_disk(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From time to time, not for each."""
    happened: list[str] = []
    clock = iter(range(0, 10_000, 10))
    real = folder_writer.os.rename
    monkeypatch.setattr(folder_writer.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(folder_writer.os, "sync", lambda: happened.append("synced"))
    monkeypatch.setattr(folder_writer.os, "rename", lambda a, b: (happened.append(b.name), real(a, b)))
    write_folder(open_source(str(image_folder), "train"), tmp_path / "train", processes=1, progress=SILENT)
    first, *rest = " ".join(happened).split("synced")
    assert first == ""
    assert len(rest) > 1
    assert " ".join(rest).split() == ["ant", "bee", "cat", "dog", "eel", "fox"]
    assert all(each.strip() for each in rest)


def test_a_large_class_is_written_by_all_processes_and_its_progress_told(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not class by class: most people's folders have few."""
    monkeypatch.setattr(folder_writer, "IMAGES_PER_PART", 2)
    monkeypatch.setattr("resnet_in1k.utils.pool.PRINTED_EVERY_SECONDS", 0.0)
    both_work, lines = multiprocessing.get_context("fork").Barrier(2, timeout=60), []
    met: list[int] = []

    def change(image: bytes) -> bytes:
        if not met:  # in each process once
            met.append(both_work.wait())
        return b"%d " % os.getpid() + image

    source = open_source(str(image_folder), "train")
    write_folder(source, tmp_path / "train", 2, Progress(lines.append), change)
    told = [int(line.split(" of 37 images")[0].split()[-1]) for line in lines if " of 37 images" in line]
    assert told == sorted(told)
    assert told[-1] == 37
    assert len(told) == 4 + 5 * 3  # classes of seven and six, two images at a time
    written = [path.read_bytes().split(b" ", 1) for path in sorted((tmp_path / "train").rglob("*.jpg"))]
    assert [image for _, image in written] == [source.read(index).tobytes() for index in range(37)]
    assert len({process for process, _ in written}) == 2


@pytest.mark.parametrize("links", [True, False])
def test_what_a_power_cut_left_of_a_copy_is_written_again(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
):
    """Links and, where there can be none, copies; the markers are of the time before it."""
    if not links:  # as Linux does, which looks at the target before it looks at the file systems
        monkeypatch.setattr(os, "link", lambda a, b: refuse(errno.EEXIST if b.exists() else errno.EXDEV))
    data = Path(shutil.copytree(image_folder, tmp_path / "images"))
    source = open_source(str(data), "train")
    write_folder(source, tmp_path / "train", 1, SILENT)
    (tmp_path / "train/ant").rename(tmp_path / "train/.partial.ant")
    with pytest.raises(UserError, match=r"train is not whole: prepare_data\.py was stopped there; run that"):
        open_source(str(tmp_path), "train")
    torn = tmp_path / "train/.partial.ant/0.jpg"
    torn.unlink()
    torn.write_bytes(b"")
    (tmp_path / "train/.partial.ant/.done.0").write_text("the boot before")
    write_folder(source, tmp_path / "train", 1, SILENT)
    files = sorted((tmp_path / "train").rglob("*.jpg"))
    assert [path.read_bytes() for path in files] == [source.read(index).tobytes() for index in range(37)]
    assert (files[3].stat().st_nlink == 2) == links


def refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_links_are_found_by_trying(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One file system mounted twice has one number, and no links between the two."""
    source = open_source(str(image_folder), "train")
    assert folder_writer.can_link(source, tmp_path / "not/there")
    monkeypatch.setattr(os, "link", lambda a, b: refuse(errno.EXDEV))
    assert not folder_writer.can_link(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_images_are_never_one_file(image_folder: Path, tmp_path: Path):
    """Before anything is written."""
    source = open_source(str(image_folder), "train")
    paths = [source.key(index) for index in range(len(source))]

    class Twice(FileSource):
        def key(self, index: int) -> bytes:
            return paths[index] if index != 9 else b"copies/" + paths[8]

    fields = ("name", "split", "class_names", "labels", "items", "folder")
    twice = Twice(**{name: getattr(source, name) for name in fields})
    with pytest.raises(UserError, match=r"bee/2\.jpg and .*bee/1\.jpg would be the same file in class bee"):
        write_folder(twice, tmp_path / "train", 1, SILENT)
    assert not (tmp_path / "train").exists()


def hold(folder: Path, connection) -> None:
    folder.mkdir()
    lock = FolderLock(folder)
    connection.send("locked")
    connection.recv()
    lock.close()


def test_a_second_run_on_the_same_folder_is_refused(image_folder: Path, tmp_path: Path):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "out", theirs))
    process.start()
    assert ours.recv() == "locked"
    how = PrepareOptions(data=str(image_folder), output=tmp_path / "out", processes=1)
    with pytest.raises(UserError, match=rf"is being written to by process {process.pid} on .*; wait for it"):
        prepare(how)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    ours.send("go")
    process.join()
    prepare(how)
    assert len(contents(tmp_path / "out")) == 49


def test_without_locks_it_goes_on_and_says_so(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    said = prepare(PrepareOptions(data=str(image_folder), output=tmp_path / "out", processes=1))
    assert "out cannot be locked (Function not implemented)" in said[0]
    assert len(contents(tmp_path / "out")) == 49
