"""One suite for all kinds of sources: a folder, shards and tables with the same images in the same order."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.loading import train_batches
from helpers.processes import assert_same_end
from helpers.sources import as_parquet, as_shards
from helpers.training import narrow_resnet18, run

from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError

KINDS = ("folder", "shards", "hf")


@pytest.fixture(scope="session")
def data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The value of `--data` for each kind."""
    return {kind: made_of(image_folder, kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def made_of(folder: Path, kind: str, target: Path) -> str:
    """Write a folder's images in this form; return the value of `--data`."""
    return str(folder) if kind == "folder" else {"shards": as_shards, "hf": as_parquet}[kind](folder, target)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_labels_and_names_in_the_same_order(data: dict[str, str], image_folder: Path, kind: str):
    """After pickling, as the main process opens a source for the others."""
    for opened, folder in zip(open_train_and_val(data[kind]), open_train_and_val(str(image_folder)), strict=True):
        source: Source = pickle.loads(pickle.dumps(opened))
        assert source.fingerprint() == opened.fingerprint()
        assert (source.split, source.class_names, source.note) == (folder.split, folder.class_names, "")
        assert np.array_equal(source.labels, folder.labels)
        assert source.labels.dtype == np.int64
        for index in range(len(folder)):
            assert source.read(index).tobytes() == folder.read(index).tobytes()
            assert Path(folder.image_name(index)).stem in source.image_name(index)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_tensors_with_any_number_of_workers(data: dict[str, str], tiny: Recipe, kind: str, num_workers: int):
    expected = train_batches(open_source(data["folder"], "train"), tiny, last_step=8)
    batches = train_batches(open_source(data[kind], "train"), tiny, last_step=8, num_workers=num_workers)
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_changes_with_the_images(data: dict[str, str], image_folder: Path, kind: str, tmp_path: Path):
    changed = Path(shutil.copytree(image_folder, tmp_path / "changed"))
    (changed / "train/ant/0.jpg").unlink()
    shutil.copy(changed / "train/bee/0.jpg", changed / "train/ant/7.jpg")
    before, after = open_source(data[kind], "train"), open_source(made_of(changed, kind, tmp_path / "made"), "train")
    assert len(before) == len(after)
    assert before.fingerprint() == open_source(data[kind], "train").fingerprint() != after.fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shuffle_window"), [("shards", 2), ("hf", 0)])
def test_a_resumed_run_ends_as_if_never_interrupted(
    data: dict[str, str], tiny: Recipe, tmp_path: Path, kind: str, shuffle_window: int
):
    recipe = replace(tiny, epochs=1, shuffle_window=shuffle_window)
    with narrow_resnet18():
        whole = run(recipe, data[kind], tmp_path / "run", checkpoint_every=3)
        resumed = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "copy")))
        shutil.rmtree(resumed.checkpoints / "step_00000004")
        run(recipe, data[kind], resumed.path, checkpoint_every=3, resume=True)
    assert_same_end(resumed, whole)


def test_only_shards_have_windows(data: dict[str, str], tiny: Recipe, tmp_path: Path):
    with pytest.raises(UserError, match="--shuffle-window needs --data shards:"):
        run(replace(tiny, shuffle_window=2), data["folder"], tmp_path / "folder")
