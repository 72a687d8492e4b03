"""Sources in memory and in files, and the division of one source into train and val."""

import gc
import hashlib
import json
import multiprocessing
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers.sources import as_parquet, as_shards
from helpers.training import narrow_resnet18, run

from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.data.dataset import PackedBytes, PackedSource
from resnet_in1k.data.image_folder import open_paths
from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.errors import UserError

ITEMS = [b"one", b"", "zwölf/Bild.jpg".encode(), b"\xff\x00"]


def in_memory(items: list[bytes] = ITEMS, labels: tuple[int, ...] = (0, 1, 0, 1), **changes: object) -> PackedSource:
    facts = {"name": "x", "split": "val", "class_names": ("a", "b"), **changes}
    return PackedSource(labels=np.array(labels), items=PackedBytes(items), **facts)


def read_all(source: PackedSource) -> None:
    """Exit with 1 if that copies more than 2 MB."""
    gc.disable()  # it would write to, and so copy, all that was inherited
    process = psutil.Process()
    before = process.memory_full_info().uss
    for index in range(len(source)):
        source.read(index)
    sys.exit(process.memory_full_info().uss - before > 2e6)


def test_a_forked_process_copies_none_of_the_images_that_it_reads():
    """Reading an item of a Python list writes its reference count, which copies its page of memory: 13 MB here."""
    items = [number.to_bytes(4, "big") * 25 for number in range(100_000)]
    source = in_memory(items, labels=(0,) * len(items))
    process = multiprocessing.get_context("fork").Process(target=read_all, args=(source,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_fingerprint_changes_with_images_labels_and_class_names():
    assert in_memory().fingerprint() == in_memory(name="y").fingerprint()
    divided_differently = [b"on", b"e", *ITEMS[2:]]
    for changed in ({"items": divided_differently}, {"labels": (0, 1, 1, 1)}, {"class_names": ("a", "c")}):
        assert in_memory(**changed).fingerprint() != in_memory().fingerprint()


def test_a_file_name_need_not_be_utf8_and_a_read_error_is_not_the_end_of_the_file(tmp_path: Path):
    name = str(tmp_path / "\udcff.jpg")
    Path(name).write_bytes(b"content")
    source = open_paths([Path(name), tmp_path / "folder.jpg"])
    (tmp_path / "folder.jpg").mkdir()
    assert source.read(0).tobytes() == b"content"
    assert source.image_name(0) == name
    assert source.read(0).flags.writeable  # torch warns about read-only arrays
    with pytest.raises(OSError, match="Is a directory"):
        source.read(1)


@pytest.fixture
def classes(image_folder: Path, tmp_path: Path) -> Path:
    """The six class folders of train/, without a val split."""
    return Path(shutil.copytree(image_folder / "train", tmp_path / "mine"))


def names(data: Path, share: float) -> list[set[str]]:
    sources = open_train_and_val(str(data), share)
    return [{source.image_name(index) for index in range(len(source))} for source in sources]


def place(key: str) -> float:
    return int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 16**16


def test_an_added_image_moves_no_other_and_the_place_of_the_folder_does_not_matter(classes: Path, tmp_path: Path):
    before = names(classes, 0.3)
    shutil.copy(classes / "ant/0.jpg", classes / "ant/added.jpg")
    moved = Path(shutil.copytree(classes, tmp_path / "elsewhere/train"))
    for split, after in zip(before, names(moved, 0.3), strict=True):
        assert {name.replace(str(classes), str(moved)) for name in split} <= after


def test_every_class_is_in_both_splits(classes: Path):
    for share in (1e-9, 1 - 1e-9):
        for source in open_train_and_val(str(classes), share):
            assert set(source.labels.tolist()) == set(range(6))


def test_what_cannot_be_divided_is_named(classes: Path, image_folder: Path, tmp_path: Path):
    shards, table = as_shards(image_folder, tmp_path / "shards"), as_parquet(image_folder, tmp_path / "table")
    for data, message in (
        (str(image_folder), r"--val-share: .* has a val split; omit --val-share, or give --data .*train$"),
        ("digits", "--val-share is for images without a val split; digits has one"),
        (shards, "has a val split; omit --val-share, or name the shards by a pattern"),
        (table, "has a val split, validation; omit --val-share, or name one split: hf:NAME:CONFIG:"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(data, "val", 0.2)


@pytest.mark.parametrize("kind", ["folder", "shards", "hf"])
def test_each_image_is_in_one_split_by_the_hash_of_its_name(
    image_folder: Path, classes: Path, tmp_path: Path, kind: str
):
    """Of its path, its key or its row."""
    if kind == "folder":
        data = str(classes)
    elif kind == "shards":
        data = as_shards(image_folder, tmp_path / "made")
        shutil.rmtree(tmp_path / "made/val")
    else:
        data = as_parquet(image_folder, tmp_path / "made") + "::train"
    splits = open_train_and_val(data, 0.3)
    folder = open_source(str(image_folder), "train")  # the same images in the same order
    place_of = {folder.read(index).tobytes(): index for index in range(len(folder))}
    found = [[place_of[source.read(index).tobytes()] for index in range(len(source))] for source in splits]
    assert sorted(found[0] + found[1]) == list(range(len(folder)))
    for source, places in zip(splits, found, strict=True):
        assert np.array_equal(source.labels, folder.labels[places])
        for index, row in enumerate(places):
            name = source.image_name(index)
            key = {"folder": "/".join(Path(name).parts[-2:]), "shards": name.rpartition(":")[2], "hf": str(row)}[kind]
            siblings = np.count_nonzero(folder.labels[found[1]] == folder.labels[row])
            assert (source is splits[1]) == (place(key) < 0.3) or siblings == 1
    assert splits[0].fingerprint() == open_source(data, "train", 0.3).fingerprint()
    assert len({each.fingerprint() for each in (*splits, open_source(data, "train", 0.5))}) == 3


@pytest.mark.slow
def test_a_run_is_evaluated_on_its_own_share(classes: Path, tiny: Recipe, tmp_path: Path):
    with narrow_resnet18():
        folder = run(replace(tiny, epochs=1), classes, tmp_path / "run", val_share=0.25)
        own = evaluate(EvalOptions(ckpt=str(folder.path), workers=0))
        other = evaluate(EvalOptions(ckpt=str(folder.path), workers=0, val_share=0.5))
        with_slash = evaluate(EvalOptions(ckpt=str(folder.path), data=f"{classes}/", workers=0))
    assert json.loads(folder.recipe.read_text())["data"]["val_share"] == 0.25
    assert own.counts["top1_correct"] == json.loads(folder.evaluation.read_text())["top1_correct"]
    assert with_slash.source.fingerprint() == own.source.fingerprint()
    assert own.counts["num_images"] == len(names(classes, 0.25)[1])
    assert other.counts["num_images"] == len(names(classes, 0.5)[1]) > own.counts["num_images"]
