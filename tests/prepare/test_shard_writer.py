"""Shards written from any source: whole, the same bytes each time, readable by the convention's other readers."""

import json
import tarfile
from pathlib import Path

import pytest
from helpers.sources import SILENT, as_shards

from resnet_in1k.core.errors import UserError
from resnet_in1k.data.sources import open_source
from resnet_in1k.prepare.shard_writer import write_shards


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
