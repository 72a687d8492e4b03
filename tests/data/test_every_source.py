"""One suite for all sources of images: folder, shards and tables hold the same, in the same order."""

import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.loading import train_batches
from helpers.processes import TWO_PROCESSES, at, rank_of, start
from helpers.sources import as_parquet, as_shards
from helpers.training import losses, run
from safetensors.torch import load_file

from resnet_in1k.core.errors import BadImageError, UserError
from resnet_in1k.data.source import Source
from resnet_in1k.data.sources import open_source, open_train_and_val, source_facts
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run.folder import RunFolder

KINDS = ("folder", "shards", "hf")


@pytest.fixture(scope="session")
def data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `--data` names each kind by."""
    return {
        "folder": str(image_folder),
        "shards": as_shards(image_folder, tmp_path_factory.mktemp("shards")),
        "hf": as_parquet(image_folder, tmp_path_factory.mktemp("tables")),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_labels_and_names_in_the_same_order(data: dict[str, str], image_folder: Path, kind: str):
    for source, folder in zip(open_train_and_val(data[kind]), open_train_and_val(str(image_folder)), strict=True):
        assert (source.split, source.class_names, source.note) == (folder.split, folder.class_names, "")
        assert np.array_equal(source.labels, folder.labels)
        assert source.labels.dtype == np.int64
        for index in range(len(folder)):
            assert source.read(index).tobytes() == folder.read(index).tobytes()
            stem = Path(folder.image_name(index)).stem
            assert stem in source.image_name(index)
    facts = source_facts(data[kind])
    assert facts.limits
    assert str(image_folder.parent.parent) not in facts.data_flag + facts.name


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tensors_by_any_number_of_workers(data: dict[str, str], tiny: Recipe, kind: str):
    expected = train_batches(open_source(data["folder"], "train"), tiny, last_step=8)
    for workers in (0, 2):
        batches = train_batches(open_source(data[kind], "train"), tiny, last_step=8, num_workers=workers)
        for ours, theirs in zip(batches, expected, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_survives_pickling_and_a_spawned_process(data: dict[str, str], kind: str):
    source = open_source(data[kind], "val")
    again: Source = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == source.fingerprint()
    assert again.read(5).tobytes() == source.read(5).tobytes()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_bytes, (source, 5)) == source.read(5).tobytes()


def first_bytes(source: Source, index: int) -> bytes:
    return source.read(index).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_changes_with_the_images(
    data: dict[str, str], image_folder: Path, kind: str, tmp_path: Path, photographs
):
    import shutil

    changed = Path(shutil.copytree(image_folder, tmp_path / "changed"))
    (changed / "train/ant/0.jpg").unlink()
    shutil.copy(changed / "train/bee/0.jpg", changed / "train/ant/7.jpg")
    made = {"folder": lambda: str(changed), "shards": lambda: as_shards(changed, tmp_path / "s")}
    made["hf"] = lambda: as_parquet(changed, tmp_path / "t")
    before, after = open_source(data[kind], "train"), open_source(made[kind](), "train")
    assert len(before) == len(after)
    assert before.fingerprint() == open_source(data[kind], "train").fingerprint() != after.fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "hf"])
def test_the_same_run_killed_and_resumed_has_the_same_bits(
    data: dict[str, str], finished: RunFolder, tiny: Recipe, tmp_path: Path, kind: str
):
    """As the run on the folder that nobody interrupted: stopped after five of eight steps, its last state lost."""
    how = {"checkpoint_every": 3, "keep_checkpoints": 9}
    folder = run(tiny, data[kind], tmp_path / "run", **how)
    for step in (6, 8):
        (folder.checkpoints / f"step_{step:08d}").rename(tmp_path / f"lost{step}")
    run(tiny, data[kind], folder.path, resume=True, **how)
    assert losses(folder) == losses(finished)
    for name in ("model", "optimizer"):
        ours, theirs = (
            load_file(each.checkpoints / f"step_00000008/{name}.safetensors") for each in (folder, finished)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_named(tiny: Recipe, image_folder: Path, tmp_path: Path, kind: str):
    import shutil

    damaged = Path(shutil.copytree(image_folder, tmp_path / "damaged"))
    for path in damaged.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:150])
    made = {"folder": lambda: str(damaged), "shards": lambda: as_shards(damaged, tmp_path / "s")}
    made["hf"] = lambda: as_parquet(damaged, tmp_path / "t")
    source = open_source(made[kind](), "train")
    with pytest.raises(BadImageError, match=r"cannot be read as an image") as caught:
        train_batches(source, replace(tiny, epochs=1), last_step=1)
    assert any(name in str(caught.value) for name in (source.image_name(index) for index in range(len(source))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "hf"])
def test_two_processes_killed_and_resumed_have_the_bits_of_the_folder(
    data: dict[str, str], trained_by_two: tuple[RunFolder, str], tmp_path: Path, kind: str
):
    """One of them is killed (-9) in the second epoch."""
    folder = RunFolder(tmp_path / "run")
    first = start(data[kind], folder.path, launcher=TWO_PROCESSES)
    at(first, "step 6/8", lambda: rank_of(first, 1).kill())
    assert first.returncode != 0
    again = start(data[kind], folder.path, "--resume", launcher=TWO_PROCESSES)
    printed, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "resuming after step 4 from" in printed
    expected, _ = trained_by_two
    for name in ("model", "optimizer"):
        last = f"step_00000008/{name}.safetensors"
        assert (folder.checkpoints / last).read_bytes() == (expected.checkpoints / last).read_bytes()


def test_a_window_of_shards_is_read_ahead_and_resumed_to_the_same_bits(
    data: dict[str, str], image_folder: Path, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, how = replace(tiny, shuffle_window=2), {"checkpoint_every": 3, "keep_checkpoints": 9}
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, size, advice: asked.append((file, offset)))
    shards = as_shards(image_folder, tmp_path / "one")
    run(tiny, shards, tmp_path / "all", **how)
    assert asked == []
    shards = as_shards(image_folder, tmp_path / "other")
    whole = run(recipe, shards, tmp_path / "whole", **how)
    assert len(asked) == len(open_source(shards, "train").index.shards)  # each is small: one call for all of it
    last = (whole.checkpoints / "step_00000008/model.safetensors").read_bytes()
    for step in (6, 8):
        (whole.checkpoints / f"step_{step:08d}").rename(tmp_path / f"lost{step}")
    run(recipe, shards, whole.path, resume=True, **how)
    assert (whole.checkpoints / "step_00000008/model.safetensors").read_bytes() == last
    with pytest.raises(UserError, match="--shuffle-window is for --data shards:…, not for"):
        run(recipe, data["folder"], tmp_path / "folder")
