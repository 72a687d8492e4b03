"""One suite for all kinds of sources: a folder, shards and tables with the same images in the same order."""

import os
import pickle
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.loading import eval_batches, train_batches
from helpers.processes import ROOT, TWO_PROCESSES, at, rank_of, start
from helpers.sources import as_parquet, as_shards
from helpers.training import losses, run
from safetensors.torch import load_file

from resnet_in1k.data import loader
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import open_source, open_train_and_val, source_facts
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils import pool as workers
from resnet_in1k.utils.errors import ProcessError, UserError

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


@pytest.mark.parametrize(
    ("kind", "context"), [("folder", "fork"), ("shards", "fork"), ("hf", "fork"), ("shards", "spawn"), ("hf", "spawn")]
)
def test_the_same_tensors_by_workers_however_they_start(
    data: dict[str, str], tiny: Recipe, kind: str, context: str, monkeypatch: pytest.MonkeyPatch
):
    expected = train_batches(open_source(data["folder"], "train"), tiny, last_step=8)
    for module in (loader, workers):
        monkeypatch.setattr(module, "worker_context", lambda: context)
    for num_workers in (0, 2) if context == "fork" else (1,):
        batches = train_batches(open_source(data[kind], "train"), tiny, last_step=8, num_workers=num_workers)
        for ours, theirs in zip(batches, expected, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("kind", [*KINDS, "digits"])
def test_a_source_survives_pickling(data: dict[str, str], kind: str):
    """The main process opens it for the others."""
    source = open_source(data.get(kind, kind), "val")
    again: Source = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == source.fingerprint()
    assert again.image_name(5) == source.image_name(5)
    assert again.read(5).tobytes() == source.read(5).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_changes_with_the_images(data: dict[str, str], image_folder: Path, kind: str, tmp_path: Path):
    changed = Path(shutil.copytree(image_folder, tmp_path / "changed"))
    (changed / "train/ant/0.jpg").unlink()
    shutil.copy(changed / "train/bee/0.jpg", changed / "train/ant/7.jpg")
    before, after = open_source(data[kind], "train"), open_source(made_of(changed, kind, tmp_path / "made"), "train")
    assert len(before) == len(after)
    assert before.fingerprint() == open_source(data[kind], "train").fingerprint() != after.fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "hf"])
def test_the_same_run_killed_and_resumed_has_the_same_bits(
    data: dict[str, str], finished: RunFolder, tiny: Recipe, tmp_path: Path, kind: str
):
    """It equals the uninterrupted run on the folder, although the checkpoints of steps 6 and 8 are lost."""
    how = {"checkpoint_every": 3, "keep_checkpoints": 9}
    folder = run(tiny, data[kind], tmp_path / "run", **how)
    for step in (6, 8):
        (folder.checkpoints / f"step_{step:08d}").rename(tmp_path / f"lost{step}")
    run(tiny, data[kind], folder.path, resume=True, **how)
    assert len(losses(folder)) == 8
    assert losses(folder) == losses(finished)
    for name in ("model", "optimizer"):
        ours, theirs = (
            load_file(each.checkpoints / f"step_00000008/{name}.safetensors") for each in (folder, finished)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_file_is_named(image_folder: Path, tmp_path: Path, kind: str):
    """A file that was removed or truncated since it was listed. The table is one of paths: parquet files are mapped."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    source = open_source(f"hf:{folder}" if kind == "hf" else made_of(folder, kind, tmp_path / "made"), "val")
    if kind == "shards":
        dead = Path(source.index.shards[-1])
        os.truncate(dead, 512)
    else:
        (dead,) = folder.glob("val/fox/1.jpg")
        dead.unlink()
    with pytest.raises(ProcessError, match="cannot be read from its disk: ") as caught:
        eval_batches(source)
    assert str(dead) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_workers_do_not_grow_from_epoch_to_epoch(data: dict[str, str], kind: str):
    """A worker's own memory after each of six passes over 1,000 images or a few more.

    In a quiet process: where the main process copies a shared page, the worker is left as the old one's only owner.
    """
    code = """
import gc, multiprocessing, sys
import psutil
from resnet_in1k.data.sampler import EvalSampler
from resnet_in1k.data.registry import open_source
from resnet_in1k.evaluate.evaluation import EvalPreprocessing, eval_loader
source = open_source(sys.argv[1], "train")
gc.freeze()
with eval_loader(source, EvalPreprocessing(8, 8), 37, 1) as loader:
    for _ in range(6):
        for _ in range(-(-1000 // len(source))):
            for _ in loader.batches(EvalSampler(len(source), 37, 8)):
                pass
        worker, = multiprocessing.active_children()
        print(psutil.Process(worker.pid).memory_full_info().uss)
gc.unfreeze()
"""
    command = [sys.executable, "-c", code, data[kind]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    own_bytes = [int(line) for line in result.stdout.split()]
    assert len(own_bytes) == 6, result.stderr
    growth = [after - before for before, after in pairwise(own_bytes)]
    assert statistics.median(growth) < 0.1e6  # a buffer may grow once; what grows with epochs grows in each


@pytest.mark.slow
def test_two_processes_killed_and_resumed_have_the_bits_of_the_folder(
    data: dict[str, str], trained_by_two: tuple[RunFolder, str], tmp_path: Path
):
    """One process is killed (-9) in the second epoch."""
    folder = RunFolder(tmp_path / "run")
    first = start(data["shards"], folder.path, launcher=TWO_PROCESSES)
    at(first, "step 6/8", lambda: rank_of(first, 1).kill())
    assert first.returncode != 0
    again = start(data["shards"], folder.path, "--resume", launcher=TWO_PROCESSES)
    printed, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "resuming after step 4 from" in printed
    expected, _ = trained_by_two
    for name in ("model", "optimizer"):
        last = f"step_00000008/{name}.safetensors"
        assert (folder.checkpoints / last).read_bytes() == (expected.checkpoints / last).read_bytes()


@pytest.mark.slow
def test_windows_of_shards_are_resumed_to_the_same_bits(data: dict[str, str], tiny: Recipe, tmp_path: Path):
    recipe, how = replace(tiny, shuffle_window=2), {"checkpoint_every": 3, "keep_checkpoints": 9}
    folder = run(recipe, data["shards"], tmp_path / "run", **how)
    last = (folder.checkpoints / "step_00000008/model.safetensors").read_bytes()
    for step in (6, 8):
        (folder.checkpoints / f"step_{step:08d}").rename(tmp_path / f"lost{step}")
    run(recipe, data["shards"], folder.path, resume=True, **how)
    assert (folder.checkpoints / "step_00000008/model.safetensors").read_bytes() == last
    with pytest.raises(UserError, match="--shuffle-window is for --data shards:"):
        run(recipe, data["folder"], tmp_path / "folder")
