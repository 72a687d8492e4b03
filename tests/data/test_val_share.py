"""A val split of data that have none: by the images' names, the same everywhere."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.training import run

from resnet_in1k.commands.evaluate import EvalOptions, evaluate
from resnet_in1k.core.errors import UserError
from resnet_in1k.data.sources import open_source, open_train_and_val
from resnet_in1k.recipes.recipe import Recipe


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
    with pytest.raises(UserError, match=r"--val-share 0\.2: .* has a val split; leave it out, or name .*train$"):
        open_source(str(image_folder), "val", 0.2)
    with pytest.raises(UserError, match="--val-share is for a folder of images; digits must have a val split"):
        open_source("digits", "val", 0.2)
    with pytest.raises(UserError, match="for images without a val split give --val-share"):
        open_source(str(classes), "val")
    for file in list((classes / "bee").iterdir())[1:]:
        file.unlink()
    with pytest.raises(UserError, match=r"bee: one image, which cannot be in both splits; add some, or remove it$"):
        open_source(str(classes), "val", 0.2)


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
