"""A folder by class: written by parts, gone on with, and never two images in one file."""

import errno
import multiprocessing
from pathlib import Path

import pytest
from helpers.preparing import contents, prepare
from helpers.sources import SILENT

from resnet_in1k.commands.prepare_data import PrepareOptions
from resnet_in1k.core.errors import UserError
from resnet_in1k.core.lock import FolderLock
from resnet_in1k.data.parallel import Progress
from resnet_in1k.data.source import FileSource
from resnet_in1k.data.sources import open_source
from resnet_in1k.prepare import folder_writer
from resnet_in1k.prepare.folder_writer import write_folder


def test_what_is_written_of_a_class_is_not_written_again(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also of the class in which the first run ended: at its second image, of classes of six by parts of two."""
    monkeypatch.setattr(folder_writer, "IMAGES_PER_PART", 2)
    source = open_source(str(image_folder), "train")
    assert source.labels[:21].tolist() == [0] * 7 + [1] * 6 + [2] * 6 + [3] * 2
    written: list[bytes] = []

    def change(image: bytes) -> bytes:
        if len(written) == stops_after:
            raise ValueError("somebody stops it")
        written.append(image)
        return image + b"!"

    how = {"processes": 1, "progress": SILENT, "change": change}
    stops_after = 20
    with pytest.raises(UserError, match=r"dog/1\.jpg cannot be decoded \(somebody stops it\)"):
        write_folder(source, tmp_path / "train", **how)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        *(".partial.dog", ".partial.eel", ".partial.fox", ".plan.json"),
        *("ant", "bee", "cat"),
    ]
    written.clear()
    stops_after = 99
    write_folder(source, tmp_path / "train", **how)
    assert len(written) == 37 - 19  # whose part was not whole
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        ".plan.json",
        *("ant", "bee", "cat", "dog", "eel", "fox"),
    ]
    files = sorted(path for path in (tmp_path / "train").rglob("*") if path.is_file() and path.name != ".plan.json")
    assert [path.read_bytes()[:-1] for path in files] == [source.read(index).tobytes() for index in range(37)]


def test_a_large_class_is_written_by_all_processes_and_its_progress_told(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not class by class: most people's folders have few."""
    monkeypatch.setattr(folder_writer, "IMAGES_PER_PART", 2)
    monkeypatch.setattr("resnet_in1k.data.parallel.PRINTED_EVERY_SECONDS", 0.0)
    lines: list[str] = []
    source = open_source(str(image_folder), "train")
    write_folder(source, tmp_path / "train", 2, Progress(lines.append))
    told = [int(line.split(" of 37 images")[0].split()[-1]) for line in lines if " of 37 images" in line]
    assert told == sorted(told)
    assert told[-1] == 37
    assert len(told) == 4 + 5 * 3  # classes of seven and six, two images at a time


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
