"""Tar shards in WebDataset's format: the files of a split, their index, reading, damage."""

import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.archives import add, tar_of
from helpers.sources import as_shards

from resnet_in1k.data import tar_index, tar_shards
from resnet_in1k.data.decode import read_image
from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.data.tar_shards import find_shards
from resnet_in1k.utils.errors import ProcessError, UserError


def write_tar(path: Path, *entries: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(entries))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/resnet_in1k"


@pytest.fixture
def shards(image_folder: Path, tmp_path: Path) -> Path:
    """train/*.tar and val/*.tar with the photographs."""
    as_shards(image_folder, tmp_path / "shards")
    return tmp_path / "shards"


def test_shards_of_others_by_cls_or_json_in_the_order_of_their_keys(tmp_path: Path):
    with_json = [("d/a.seg.png", b"no image"), ("d/a.json", b'{"label": 1, "filename": "x"}'), ("d/a.JPEG", b"third")]
    write_tar(tmp_path / "set-train-01.tar", ("b.jpg", b"second"), ("b.cls", b"2"), *with_json)
    write_tar(tmp_path / "set-train-00.tar", ("c.png", b"0"), ("c.cls", b"0"), ("a.cls", b" 0\n"), ("a.jpg", b"first"))
    write_tar(tmp_path / "set-val-00.tar", ("v.webp", b"valid"), ("v.cls", b"1"), ("readme.txt", b"text"))
    train, val = open_train_and_val(f"shards:{tmp_path}")
    assert [train.read(index).tobytes() for index in range(4)] == [b"first", b"second", b"0", b"third"]
    assert train.labels.tolist() == [0, 2, 0, 1]
    assert train.image_name(3) == f"{tmp_path}/set-train-01.tar:d/a"
    assert train.class_names == val.class_names == ("0", "1", "2")  # there are no other names
    assert val.labels.tolist() == [1]
    (tmp_path / "classes.json").write_text('["ant", "bee", "cat"]')
    assert open_source(f"shards:{tmp_path}", "val").class_names == ("ant", "bee", "cat")
    write_tar(tmp_path / "mine/train-0.tar", ("a.jpg", b"image"), ("a.cls", b"0"))
    assert open_source(f"shards:{tmp_path}/mine", "train").class_names == ("0",)  # the names above are of other shards


def test_shards_are_indexed_once(shards: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    data, listings_of_folders = f"shards:{shards}", set(cache.glob("*"))
    before = open_source(data, "train")
    (index,) = set(cache.glob("*")) - listings_of_folders
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "read_shard", None)
        cached = open_source(data, "train")
    assert cached.fingerprint() == before.fingerprint()
    assert cached.read(9).tobytes() == before.read(9).tobytes()

    shard = shards / "train/shard-000000.tar"
    os.utime(shard, ns=(1, 1))
    assert open_source(data, "train").shards[0][1:] == (shard.stat().st_size, 1)
    for damaged in (b"", b"not an index", index.read_bytes()[:500]):
        index.write_bytes(damaged)
        assert open_source(data, "train").fingerprint() == before.fingerprint()


def test_more_shards_than_files_that_may_be_open(tmp_path: Path):
    number = tar_shards.MAX_OPEN_SHARDS + 20
    for each in range(number):
        write_tar(tmp_path / f"train/{each:03d}.tar", (f"{each:03d}.jpg", b"%d" % each), (f"{each:03d}.cls", b"0"))
    source = open_source(f"shards:{tmp_path}", "train")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [int(source.read(index).tobytes()) for index in range(number)] == list(range(number))
    assert len(os.listdir("/proc/self/fd")) <= before + tar_shards.MAX_OPEN_SHARDS


@pytest.mark.parametrize("kind", ["Mac", "unsorted", "dots"])
def test_shards_as_other_programs_write_them(tmp_path: Path, kind: str):
    """With a Mac's hidden entries; all images before all labels; with dots in the keys."""
    images, labels = {f"0.{n}": b"%d" % n for n in range(5)}, {f"0.{n}": n % 2 for n in range(5)}
    if kind != "dots":
        images, labels = ({key.replace(".", ""): value for key, value in each.items()} for each in (images, labels))
    entries = [[(f"{key}.jpg", images[key]), (f"{key}.cls", b"%d" % labels[key])] for key in images]
    flat = [entry for sample in (zip(*entries, strict=True) if kind == "unsorted" else entries) for entry in sample]
    if kind == "Mac":
        flat = [pair for entry in flat for pair in ((f"./._{entry[0]}", b"Mac OS X"), (f"./{entry[0]}", entry[1]))]
        flat += [("./.DS_Store", b""), ("__MACOSX/._001.jpg", b""), ("__MACOSX/001.jpg", b"")]
    write_tar(tmp_path / "train/0.tar", *flat)
    source = open_source(f"shards:{tmp_path}", "train")
    assert [source.read(index).tobytes() for index in range(len(source))] == list(images.values())
    assert source.labels.tolist() == list(labels.values())


@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_labels_may_be_names(tmp_path: Path, suffix: str):
    """Numbered as a folder numbers its classes, or as classes.json does; alike in all splits, also from the cache."""

    def write(split: str, *names: str) -> None:
        for number, name in enumerate(names):
            label = name.encode() if suffix == "cls" else json.dumps({"label": name}).encode()
            write_tar(tmp_path / f"{split}/{number}.tar", (f"{number}.jpg", b"image"), (f"{number}.{suffix}", label))

    write("train", "the dog", "7", "cât", "the dog")
    write("val", "the dog", "cât")
    for _ in range(2):
        train, val = open_train_and_val(f"shards:{tmp_path}")
        assert train.class_names == val.class_names == ("7", "cât", "the dog")
        assert (train.labels.tolist(), val.labels.tolist()) == ([2, 0, 1, 2], [2, 1])

    write("val", "the dog", "ox")
    with pytest.raises(UserError, match=r"val has labels of no class: ox; list all classes in classes\.json next to"):
        open_train_and_val(f"shards:{tmp_path}")
    (tmp_path / "classes.json").write_text('["the dog", "ox", "cât", "7"]')
    train, val = open_train_and_val(f"shards:{tmp_path}")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 3, 2, 0], [0, 1])


IMAGE = ("a.jpg", b"image")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([IMAGE], r"0\.tar: a has no label; it needs a number from 0 or a name in a \.cls"),
        ([IMAGE, ("a.cls", b"-1")], "a has no label"),
        ([IMAGE, ("a.json", b'{"label": true}')], "a has no label"),
        ([IMAGE, ("a.json", b'{"class": 1}')], "a has no label"),
        ([IMAGE, ("a.png", b"other"), ("a.cls", b"0")], "a has two images"),
        ([("a.txt", b"text"), ("a.json", b"{}")], "no images with labels in the 1 shards"),
        ([("a.img.jpg", b"image"), ("a.cls", b"0")], "a has a label, but no image; an image is"),
    ],
)
def test_what_is_not_a_labeled_image_is_named(tmp_path: Path, entries: list[tuple[str, bytes]], message: str):
    write_tar(tmp_path / "train/0.tar", *entries)
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"shards:{tmp_path}", "train")
    assert "\n" not in str(caught.value)


def test_a_link_instead_of_an_image_is_named(tmp_path: Path):
    """GNU tar stores the second of two hard links as a link."""
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        add(archive, "a.jpg", b"image")
        add(archive, "a.cls", b"0")
        add(archive, "b.jpg", b"", type=tarfile.LNKTYPE, linkname="a.jpg")
    with pytest.raises(UserError, match=r"train\.tar: b: its image is a link or a device; write the shard again"):
        open_source(f"shards:{tmp_path}", "train")


def test_shards_divided_differently_are_other_data_for_windows_only(image_folder: Path, tmp_path: Path):
    many, few = (
        open_source(as_shards(image_folder, tmp_path / name, shard_bytes=size), "train")
        for name, size in (("many", 9_000), ("few", 90_000))
    )
    assert len(many.shards) > len(few.shards)
    assert few.fingerprint() == many.fingerprint()
    assert replace(few, in_windows=True).fingerprint() != replace(many, in_windows=True).fingerprint()


def test_class_names_must_be_a_list_with_a_name_for_each_label(shards: Path):
    for content, message in (
        ('["ant"]', "train has the label 5, but 1 classes"),
        ('{"ant": 0}', r"classes\.json cannot be read \(ValueError: not a list of class names\)"),
        ("[", r"classes\.json cannot be read"),
    ):
        (shards / "classes.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_source(f"shards:{shards}", "train")


def test_a_shard_that_is_truncated_or_changed_is_named(shards: Path):
    source, shard = open_source(f"shards:{shards}", "train"), shards / "train/shard-000001.tar"
    index, intact = int(np.flatnonzero(source.shard_of == 1)[-1]), shard.read_bytes()
    source.read(index)
    shard.write_bytes(intact[: len(intact) // 2 // 512 * 512])
    with pytest.raises(ProcessError, match=r"shard-000001\.tar has changed since it was indexed"):
        read_image(source, index, "fail", {})
    for part in (shard.read_bytes(), intact[:1000], b"", b"something else" * 99):
        shard.write_bytes(part)
        with pytest.raises(UserError, match=r"shard-000001\.tar is not a complete, readable tar file"):
            open_source(f"shards:{shards}", "train")
    shard.unlink()
    with pytest.raises(ProcessError, match=r"shard-000001\.tar"):
        read_image(source, index, "fail", {})


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_shards_are_found_in_a_folder_or_by_a_pattern(tmp_path: Path):
    folder = tmp_path / "set {1,2} [x]"  # a folder, so not a pattern
    touch(folder, "in-train-01.tar", "in-train-00.tar", "in-validation-00.tar", "in-train-00.txt")
    assert names(find_shards(str(folder), "train"), folder) == ["in-train-00.tar", "in-train-01.tar"]
    assert names(find_shards(str(folder), "val"), folder) == ["in-validation-00.tar"]
    touch(tmp_path / "b", "train/1.tar", "val/2.tar", "other.tar")
    assert names(find_shards(f"{tmp_path}/b", "train"), tmp_path) == ["b/train/1.tar"]
    assert names(find_shards(f"{tmp_path}/b/{{split}}/*.tar", "val"), tmp_path) == ["b/val/2.tar"]
    with pytest.raises(
        UserError, match=r"3\}\.tar: 3 of 4 are missing: .*train/0\.tar, .*train/2\.tar, .*train/3\.tar"
    ):
        find_shards(f"{tmp_path}/b/{{split}}/{{0..3}}.tar", "train")


def test_shards_without_splits_are_found_in_a_folder_or_by_a_pattern(tmp_path: Path):
    touch(tmp_path, *(f"all-{number:03d}.tar" for number in range(4)))
    assert find_shards(str(tmp_path), "train") == []
    assert len(find_shards(str(tmp_path))) == 4
    assert names(find_shards(f"{tmp_path}/all-{{001..002}}.tar"), tmp_path) == ["all-001.tar", "all-002.tar"]
    assert names(find_shards(f"{tmp_path}/all-003.tar"), tmp_path) == ["all-003.tar"]
    for place, message in (
        (f"{tmp_path}/all-{{000..003}}.tar", r"no shards of the val split; .* are named by a pattern with \{split\}"),
        (tmp_path, r"no shards of the val split; they belong in DIR/val/\*\.tar, .* give --val-share"),
        (f"{tmp_path}/{{split}}-{{1.tar", r"braces are for \{000\.\.123\}, \{a,b\} and \{split\}"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(f"shards:{place}", "val")


def test_a_splits_name_is_a_word_of_the_files_name(tmp_path: Path):
    """A part of a word does not count: validation would be on training images."""
    touch(tmp_path, "retrieval-train-0.tar", "retrieval-test-0.tar", "retrained_valid.tar")
    assert names(find_shards(str(tmp_path), "train"), tmp_path) == ["retrieval-train-0.tar"]
    assert names(find_shards(str(tmp_path), "val"), tmp_path) == ["retrained_valid.tar"]
    touch(tmp_path, "set-TRAIN-val.tar")
    with pytest.raises(UserError, match=r"set-TRAIN-val\.tar is in both splits by its name; name them by a pattern"):
        open_source(f"shards:{tmp_path}", "val")


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_that_are_not_all_written_or_copied_are_refused(shards: Path, split: str):
    """Otherwise a part of the images would be trained or evaluated on, without a warning. There may be more shards."""
    num_images, last = len(open_source(f"shards:{shards}", split)), sorted((shards / split).glob("*.tar"))[-1]
    (shards / split / "more.tar").symlink_to(last)
    assert len(open_source(f"shards:{shards}", split)) > num_images
    last.unlink()
    for place in (shards, f"{shards}/{{split}}/*.tar"):
        with pytest.raises(UserError, match=rf"{split}: 1 of \d+ shards are missing: {last.name}; copy them there, or"):
            open_train_and_val(f"shards:{place}")
