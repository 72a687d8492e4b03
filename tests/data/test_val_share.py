"""A val split of data that have none: by the images' names, the same everywhere."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.sources import as_parquet, as_shards
from helpers.training import run

from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.errors import UserError


@pytest.fixture
def classes(image_folder: Path, tmp_path: Path) -> Path:
    """Class folders alone: the six of train/."""
    return Path(shutil.copytree(image_folder / "train", tmp_path / "mine"))


def names(data: Path, share: float) -> list[set[str]]:
    sources = open_train_and_val(str(data), share)
    return [{source.image_name(index) for index in range(len(source))} for source in sources]


def test_each_image_is_in_one_split_by_its_hash(classes: Path):
    train, val = names(classes, 0.3)
    everything = {str(path) for path in classes.glob("*/*")}
    assert train | val == everything
    assert not train & val
    for name in everything:
        path = Path(name)
        place = int(hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).hexdigest()[:16], 16) / 16**16
        siblings = {each for each in val if Path(each).parent == path.parent}
        assert (name in val) == (place < 0.3) or len(siblings) == 1
    for source in open_train_and_val(str(classes), 0.3):
        assert np.bincount(source.labels, minlength=6).min() >= 1
        assert all(Path(source.image_name(i)).parent.name == source.class_names[source.labels[i]] for i in range(6))


def test_the_place_of_the_folder_does_not_matter(classes: Path, tmp_path: Path):
    """Nor whether the classes are in train/."""
    shutil.copytree(classes, tmp_path / "elsewhere/train")
    before, after = str(classes), str(tmp_path / "elsewhere/train")
    moved = names(tmp_path / "elsewhere", 0.3)
    assert [{name.replace(after, before) for name in split} for split in moved] == names(classes, 0.3)


def test_an_added_image_moves_no_other(classes: Path):
    train, val = names(classes, 0.5)
    shutil.copy(classes / "ant/0.jpg", classes / "ant/added.jpg")
    more = names(classes, 0.5)
    assert train <= more[0]
    assert val <= more[1]


def test_every_class_is_in_both_splits(classes: Path):
    for share in (1e-9, 1 - 1e-9):
        for source in open_train_and_val(str(classes), share):
            assert set(source.labels.tolist()) == set(range(6))


def test_what_cannot_be_divided_is_named(classes: Path, image_folder: Path):
    with pytest.raises(UserError, match=r"--val-share: .* has a val split; leave it out, or name .*train$"):
        open_source(str(image_folder), "val", 0.2)
    with pytest.raises(UserError, match="--val-share is for images without a val split; digits has one"):
        open_source("digits", "val", 0.2)
    with pytest.raises(UserError, match="for images without a val split give --val-share"):
        open_source(str(classes), "val")
    for file in list((classes / "bee").iterdir())[1:]:
        file.unlink()
    with pytest.raises(
        UserError, match=r"class bee has one image, .*bee/.*\.jpg, which cannot be in both splits; add some"
    ):
        open_source(str(classes), "val", 0.2)


@pytest.fixture
def undivided(image_folder: Path, tmp_path: Path) -> dict[str, str]:
    """Shards and a table with a training split alone."""
    made = {"shards": as_shards(image_folder, tmp_path / "shards"), "hf": as_parquet(image_folder, tmp_path / "table")}
    shutil.rmtree(tmp_path / "shards/val")
    for file in (tmp_path / "table/data").glob("validation-*"):
        file.unlink()
    return made


@pytest.mark.parametrize("kind", ["shards", "hf"])
def test_shards_and_tables_are_divided_alike(undivided: dict[str, str], image_folder: Path, kind: str):
    """By an image's key, and by its row; each image with its own label."""
    splits = open_train_and_val(undivided[kind], 0.3)
    folder = open_source(str(image_folder), "train")  # whose images these are, in this order
    place_of = {folder.read(index).tobytes(): index for index in range(len(folder))}
    found = [[place_of[source.read(index).tobytes()] for index in range(len(source))] for source in splits]
    assert sorted(found[0] + found[1]) == list(range(len(folder)))
    for source, places in zip(splits, found, strict=True):
        assert np.array_equal(source.labels, folder.labels[places])
        assert set(source.labels.tolist()) == set(range(6))
        assert source.split == ("val" if source is splits[1] else "train")
        assert source.image_name(3) != source.image_name(4)
    keys = {}
    for source, places in zip(splits, found, strict=True):
        for index, place in enumerate(places):  # the names are SHARD:KEY and TABLE[ROW]
            keys[place] = source.image_name(index).rpartition(":")[2] if kind == "shards" else str(place)
    for place, key in keys.items():
        is_val = int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 16**16 < 0.3
        siblings = np.count_nonzero(folder.labels[found[1]] == folder.labels[place])
        assert (place in found[1]) == is_val or siblings == 1
    assert splits[0].fingerprint() == open_source(undivided[kind], "train", 0.3).fingerprint()
    assert len({each.fingerprint() for each in (*splits, open_source(undivided[kind], "train", 0.5))}) == 3


def test_shards_that_are_not_in_splits_are_divided_by_folder_or_pattern(undivided: dict[str, str], tmp_path: Path):
    place = Path(shutil.move(tmp_path / "shards/train", tmp_path / "all"))
    for number, shard in enumerate(sorted(place.glob("*.tar"))):
        shard.rename(place / f"{number}.tar")
    train, val = open_train_and_val(f"shards:{place}", 0.3)
    assert len(train) + len(val) == 37
    again, _ = open_train_and_val(f"shards:{place}/*.tar", 0.3, rescan=True)
    assert again.fingerprint() == train.fingerprint()
    with pytest.raises(
        UserError, match=r"no shards of the val split; .*; for images without a val split give --val-share"
    ):
        open_source(f"shards:{place}", "val")


def test_data_with_a_val_split_are_not_divided(image_folder: Path, tmp_path: Path):
    shards, table = as_shards(image_folder, tmp_path / "shards"), as_parquet(image_folder, tmp_path / "table")
    with pytest.raises(UserError, match="has a val split; leave it out, or name the shards to divide by a pattern"):
        open_source(shards, "train", 0.2)
    with pytest.raises(UserError, match=r"has a val split, validation; leave it out, or name .*: hf:.*/table::train$"):
        open_source(table, "train", 0.2)
    assert len(open_source(f"{table}::train", "val", 0.2)) + len(open_source(f"{table}::train", "train", 0.2)) == 37
    with pytest.raises(UserError, match="one split, which cannot be trained and validated on; name both, as in hf:"):
        open_train_and_val(f"{table}::train")
    assert len(open_source(f"{table}::train", "val")) == 37  # to evaluate on


@pytest.mark.slow
def test_a_run_is_evaluated_on_its_own_share(classes: Path, tiny: Recipe, tmp_path: Path):
    folder = run(replace(tiny, epochs=1), classes, tmp_path / "run", val_share=0.25)
    recorded = json.loads(folder.evaluation.read_text())
    assert json.loads(folder.recipe.read_text())["data"]["val_share"] == 0.25
    evaluation = evaluate(EvalOptions(ckpt=str(folder.path), workers=0))
    assert (evaluation.num_images, evaluation.top1_correct) == (recorded["num_images"], recorded["top1_correct"])
    assert evaluation.num_images == len(names(classes, 0.25)[1])
    more = evaluate(EvalOptions(ckpt=str(folder.path), workers=0, val_share=0.5))
    assert more.num_images == len(names(classes, 0.5)[1]) > evaluation.num_images
