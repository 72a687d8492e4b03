"""Tar shards of WebDataset's convention: those of others, kept indexes, damage."""

import io
import json
import os
import resource
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.archives import add
from helpers.sources import as_shards

from resnet_in1k.data import tar_index as shard_index
from resnet_in1k.data import tar_shards as shards
from resnet_in1k.data.decode import read_image
from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.utils.errors import ProcessError, UserError


def write_tar(path: Path, *entries: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/resnet_in1k"


def test_shards_of_others_by_cls_or_json_in_the_order_of_their_keys(tmp_path: Path):
    write_tar(
        tmp_path / "set-train-01.tar",
        ("b.jpg", b"second"),
        ("b.cls", b"2"),
        ("d/a.seg.png", b"not the image"),
        ("d/a.json", b'{"label": 1, "filename": "x"}'),
        ("d/a.JPEG", b"third"),
    )
    write_tar(
        tmp_path / "set-train-00.tar", ("c.png", b"none"), ("c.cls", b"0"), ("a.cls", b" 0\n"), ("a.jpg", b"first")
    )
    write_tar(tmp_path / "set-val-00.tar", ("v.webp", b"valid"), ("v.cls", b"1"), ("readme.txt", b"text"))
    train, val = open_train_and_val(f"shards:{tmp_path}")
    assert [train.read(index).tobytes() for index in range(4)] == [b"first", b"second", b"none", b"third"]
    assert train.labels.tolist() == [0, 2, 0, 1]
    assert train.image_name(3) == f"{tmp_path}/set-train-01.tar:d/a"
    assert train.class_names == val.class_names == ("0", "1", "2")  # nothing names them
    assert val.labels.tolist() == [1]
    by_pattern = open_source(f"shards:{tmp_path}/set-{{split}}-*.tar", "train")
    assert by_pattern.fingerprint() == train.fingerprint()
    (tmp_path / "classes.json").write_text('["ant", "bee", "cat"]')
    assert open_source(f"shards:{tmp_path}", "val").class_names == ("ant", "bee", "cat")


def test_shards_are_indexed_once(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    data = as_shards(image_folder, tmp_path / "shards")
    before = open_source(data, "train")
    assert len(list((tmp_path / "shards/train").glob(".index-*.npz"))) == 1
    assert not list(cache.glob("shards-*"))
    real = shard_index.read_shard
    monkeypatch.setattr(shard_index, "read_shard", None)
    kept = open_source(data, "train")
    assert kept.fingerprint() == before.fingerprint()
    assert kept.read(9).tobytes() == before.read(9).tobytes()

    monkeypatch.setattr(shard_index, "read_shard", real)
    shard = tmp_path / "shards/train/shard-000000.tar"
    os.utime(shard, ns=(1, 1))
    again = open_source(data, "train")
    assert again.fingerprint() == before.fingerprint()
    assert again.index.stats[0].tolist() == [shard.stat().st_size, 1]
    (index,) = (tmp_path / "shards/train").glob(".index-*.npz")
    for damaged in (b"", b"no index", index.read_bytes()[:500]):
        index.write_bytes(damaged)
        assert open_source(data, "train").fingerprint() == before.fingerprint()


def test_where_the_shards_cannot_be_written_beside_the_index_is_in_the_cache(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
):
    data = as_shards(image_folder, tmp_path / "shards")
    real = shard_index.files.write_atomically

    def read_only(path: Path, write) -> None:
        if path.parent != cache:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, write)

    monkeypatch.setattr(shard_index.files, "write_atomically", read_only)
    before = open_source(data, "val")
    assert len(list(cache.glob("shards-*.npz"))) == 1
    monkeypatch.setattr(shard_index, "read_shard", None)
    assert open_source(data, "val").fingerprint() == before.fingerprint()


def test_more_shards_than_files_that_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each is opened again and again, but asked for as a whole once only, if it is read in windows."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (91, 1024))
    shards._max_open_shards.cache_clear()
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, size, advice: asked.append(file))
    number = 35
    for split in ("train", "val"):
        for each in range(number):
            write_tar(
                tmp_path / split / f"{each:03d}.tar", (f"{each:03d}.jpg", b"%d" % each), (f"{each:03d}.cls", b"0")
            )
    source = open_source(f"shards:{tmp_path}", "train")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [int(source.read(index).tobytes()) for index in range(number)] == list(range(number))
    assert len(os.listdir("/proc/self/fd")) <= before + 30
    assert asked == []
    source = replace(source, in_windows=True)
    for _ in range(3):
        assert [int(source.read(index).tobytes()) for index in range(number)] == list(range(number))
    assert len(asked) == number
    shards._max_open_shards.cache_clear()


IMAGE = ("a.jpg", b"image")
REFUSED = {
    "no label": ([IMAGE], r"0\.tar: a has no label; each image needs a \.cls"),
    "a label that is text": ([IMAGE, ("a.cls", b"ant")], "a has no label"),
    "a label below 0": ([IMAGE, ("a.cls", b"-1")], "a has no label"),
    "a label that is true": ([IMAGE, ("a.json", b'{"label": true}')], "a has no label"),
    "json without a label": ([IMAGE, ("a.json", b'{"class": 1}')], "a has no label"),
    "two images": ([IMAGE, ("a.png", b"other"), ("a.cls", b"0")], "a has two images"),
    "no images": ([("a.txt", b"text"), ("a.json", b"{}")], "no images with labels in the 1 shards"),
    "no image": ([("a.img.jpg", b"image"), ("a.cls", b"0")], r"a has a label, but no image; its name has to be a\.jpg"),
    "a label in quotes": ([IMAGE, ("a.json", b'{"label": "3"}')], "a has no label, but '3'; each image needs"),
    "a hash for a label": ([IMAGE, ("a.cls", b"9" * 30)], "a has no label, but '99999999999999999999'; each image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_labeled_image_is_named(tmp_path: Path, name: str):
    entries, message = REFUSED[name]
    write_tar(tmp_path / "train/0.tar", *entries)
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"shards:{tmp_path}", "train")
    assert "\n" not in str(caught.value)


def test_a_link_in_place_of_an_image_is_named(image_folder: Path, tmp_path: Path):
    """As GNU tar stores the second of two hard links."""
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(image_folder / "train/ant/0.jpg", "a.jpg")
        add(archive, "a.cls", b"0")
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"train\.tar: b\.jpg is a link or a device; write the shard again, with files"):
        open_source(f"shards:{tmp_path}", "train")


def test_class_names_above_flat_shards_are_not_theirs(tmp_path: Path):
    (tmp_path / "classes.json").write_text('["other", "things"]')
    write_tar(tmp_path / "mine/train-0.tar", IMAGE, ("a.cls", b"0"))
    assert open_source(f"shards:{tmp_path}/mine", "train").class_names == ("0",)


def test_shards_otherwise_divided_are_other_data_for_windows_alone(image_folder: Path, tmp_path: Path):
    """The order goes by them; without windows it does not matter in which shard an image is."""
    many, few = (
        open_source(as_shards(image_folder, tmp_path / name, shard_bytes=size), "train")
        for name, size in (("many", 9_000), ("few", 90_000))
    )
    assert len(many.index.shards) > len(few.index.shards)
    assert few.fingerprint() == many.fingerprint()
    assert replace(few, in_windows=True).fingerprint() != replace(many, in_windows=True).fingerprint()


def test_what_cannot_be_opened_is_one_line(image_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no shards of the train split; they belong in DIR/train/\*\.tar"):
        open_source(f"shards:{tmp_path}", "train")
    with pytest.raises(UserError, match=r"the pattern needs \{split\}"):
        open_source(f"shards:{tmp_path}/*.tar", "train")
    data = as_shards(image_folder, tmp_path / "shards")
    for content in ('["ant"]', '{"ant": 0}', "[", "[1, 2]"):
        (tmp_path / "shards/classes.json").write_text(content)
        with pytest.raises(UserError, match=r"classes\.json|label 5 in the train split, but 1 classes"):
            open_source(data, "train")


def test_a_shard_that_is_cut_off_or_changed_is_named(image_folder: Path, tmp_path: Path):
    data = as_shards(image_folder, tmp_path / "shards")
    source = open_source(data, "train")
    shard = tmp_path / "shards/train/shard-000001.tar"
    index = int(np.flatnonzero(source.index.shard_of == 1)[-1])
    whole = shard.read_bytes()
    source.read(index)
    shard.write_bytes(whole[: len(whole) // 2 // 512 * 512])
    with pytest.raises(ProcessError, match=r"shard-000001\.tar has changed since it was indexed"):
        read_image(source, index, "fail", {})
    for part in (whole[: len(whole) // 2 // 512 * 512], whole[:1000], b""):
        shard.write_bytes(part)
        with pytest.raises(UserError, match=r"shard-000001\.tar is cut off or no tar file"):
            open_source(data, "train")
    shard.write_bytes(b"something else" * 99)
    with pytest.raises(UserError, match=r"shard-000001\.tar is cut off or no tar file"):
        open_source(data, "train")
    shard.unlink()
    with pytest.raises(ProcessError, match=r"shard-000001\.tar"):
        read_image(source, index, "fail", {})


def test_a_label_without_a_class_is_refused(tmp_path: Path):
    write_tar(tmp_path / "train/0.tar", IMAGE, ("a.cls", b"7"))
    (tmp_path / "classes.json").write_text(json.dumps(["ant", "bee"]))
    with pytest.raises(UserError, match="label 7 in the train split, but 2 classes; labels count from 0"):
        open_source(f"shards:{tmp_path}", "train")
