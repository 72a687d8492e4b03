"""Shards written from any source: whole, the same bytes each time, readable by the convention's other readers."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from helpers.sources import SILENT, as_shards

from resnet_in1k.data.registry import open_source
from resnet_in1k.prepare.folder_writer import write_folder
from resnet_in1k.prepare.shard_writer import key_of, write_shards
from resnet_in1k.utils.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.tar")}


def test_each_image_is_in_one_shard_with_its_label(image_folder: Path, tmp_path: Path):
    as_shards(image_folder, tmp_path)
    source = open_source(str(image_folder), "train")
    assert json.loads((tmp_path / "classes.json").read_text()) == list(source.class_names)
    shards = sorted((tmp_path / "train").glob("shard-*.tar"))
    assert len(shards) > 2
    found = {}
    for shard in shards:
        with tarfile.open(shard) as archive:
            entries = {member.name: archive.extractfile(member).read() for member in archive}
        for name, data in entries.items():
            if name.endswith(".jpg"):
                found[data] = int(entries[name.removesuffix(".jpg") + ".cls"])
                assert source.class_names[found[data]] in name
    assert found == {source.read(index).tobytes(): source.labels[index] for index in range(len(source))}


def test_interrupted_and_run_again_the_bytes_are_the_same(image_folder: Path, tmp_path: Path):
    """By one process, by two, and after shards were lost; a half-written one has another name."""
    source = open_source(str(image_folder), "train")
    for name, processes in (("one", 1), ("two", 2)):
        write_shards(source, tmp_path / name / "train", 20_000, processes, SILENT)
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == whole
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one/train").glob("*.tar")}
    (tmp_path / "one/train/shard-000001.tar").unlink()
    (tmp_path / "one/train/.shard-000001.tar.1.tmp").write_bytes(b"half")
    write_shards(source, tmp_path / "one/train", 20_000, 1, SILENT)
    assert contents(tmp_path / "one") == whole
    for path, time in times.items():
        assert (path.stat().st_mtime_ns == time) == (path.name != "shard-000001.tar")


def test_shards_of_something_else_are_not_mixed(image_folder: Path, tmp_path: Path):
    write_shards(open_source(str(image_folder), "train"), tmp_path / "train", 20_000, 1, SILENT)
    for split, size in (("val", 20_000), ("train", 40_000)):
        with pytest.raises(UserError, match="has shards of other images or of another size; choose another folder"):
            write_shards(open_source(str(image_folder), split), tmp_path / "train", size, 1, SILENT)


def test_copies_of_another_size_are_something_else(image_folder: Path, tmp_path: Path):
    """Though their names are the same, and their files may be as large."""
    other = Path(shutil.copytree(image_folder, tmp_path / "images"))
    for path in (other / "val").rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-3] + b"abc")
    write_shards(open_source(str(image_folder), "val"), tmp_path / "val", 20_000, 1, SILENT)
    with pytest.raises(UserError, match="has shards of other images"):
        write_shards(open_source(str(other), "val"), tmp_path / "val", 20_000, 1, SILENT)
    write_folder(open_source(str(image_folder), "val"), tmp_path / "folder", 1, SILENT)
    with pytest.raises(UserError, match="is of other images or of another size"):
        write_folder(open_source(str(other), "val"), tmp_path / "folder", 1, SILENT)


def test_shards_are_written_to_folders_of_their_own(image_folder: Path, tmp_path: Path):
    """Not among the images themselves, nor beside class names or shards of others."""
    source = open_source(str(image_folder), "train")
    for folder in ("images/train", "foreign"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "shard-000000.tar").write_bytes(b"mine")
        with pytest.raises(UserError, match="is not empty, and was not written by this command; choose another folder"):
            write_shards(source, tmp_path / folder, 20_000, 1, SILENT)
    (tmp_path / "classes.json").write_text('["mine"]')
    with pytest.raises(UserError, match=r"classes\.json is of other images; choose another folder, or remove it"):
        write_shards(source, tmp_path / "new", 20_000, 1, SILENT)
    assert (tmp_path / "classes.json").read_text() == '["mine"]'


def test_long_names_of_any_letters_fit_into_a_tar_file():
    """A name in the old format has 100 bytes; a Chinese sign takes three."""
    for name in ("data/" + "猫" * 80 + "/" + "图" * 80 + ".jpg", "x" * 300 + "/y.jpg"):
        key = key_of(7, name)
        assert key.startswith("00000007_")
        assert 80 < len(key.encode()) <= 90
        tarfile.TarInfo(f"{key}.jpg").tobuf(tarfile.USTAR_FORMAT)
