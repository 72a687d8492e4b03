"""What would stop a run later is reported before its first step."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.images import encoded
from helpers.loading import packed_source
from helpers.training import run
from PIL import Image

from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train import preflight
from resnet_in1k.train.checkpoint import ModelGroup
from resnet_in1k.utils.errors import ProcessError, UserError

Usage = namedtuple("Usage", "total used free")


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_report_of_a_dry_run_that_writes_nothing(tiny: Recipe, image_folder: Path, tmp_path: Path, capsys):
    run(tiny, image_folder, tmp_path / "run", dry_run=True, workers=1)
    printed = capsys.readouterr().out
    for part in (
        "classes       6, with 6 to 7 training and 2 validation images each",
        "images        13 train images decoded; 12 val images decoded",
        " free, ",
        "needed for 4 checkpoints and the best weights",
        "forward and backward of 8 images in ",
        "saved, reloaded and verified in ",
    ):
        assert part in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["ant/0.jpg", "fox/5.jpg", "cat/5.jpg"])
def test_bad_image_at_either_end_or_in_the_middle(image_folder: Path, tmp_path: Path, place: str):
    """In validation it is reported and no more."""
    data = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (data / "train" / place).write_bytes(b"")
    (data / "val/ant/0.jpg").write_text("a text")
    train, val = open_train_and_val(str(data))
    assert "; 1 cannot be read: " in preflight.check_images(train, "skip")
    with pytest.raises(ProcessError, match=rf"{place} cannot be read as an image .*--on-bad-image skip"):
        preflight.check_images(train, "fail")
    text = preflight.check_images(val, "fail")
    assert text.startswith("12 val images decoded; 1 cannot be read: ")
    assert "val/ant/0.jpg (no known image format)" in text


def test_disk_that_is_too_small_is_refused_and_existing_checkpoints_need_no_more(tmp_path: Path, monkeypatch):
    """Four checkpoints of 10 MB and twice 4 MB for the best weights, less the 9 MB that are there."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 40 * 10**6))
    tensors = {"model": {"a": torch.zeros(10**6)}, "optimizer": {"b": torch.zeros(15 * 10**5)}}
    options = SimpleNamespace(keep_checkpoints=2)
    run = SimpleNamespace(folder=RunFolder(tmp_path), options=options)
    with pytest.raises(UserError, match=r"too little space: 40 MB free, 48 MB needed"):
        preflight.check_disk(run, tensors)
    (tmp_path / "checkpoints/step_00000004").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00000004/model.safetensors").write_bytes(bytes(9 * 10**6))
    assert "40 MB free, 39 MB needed for 4 checkpoints" in preflight.check_disk(run, tensors)


def test_workers_need_memory():
    assert preflight.check_memory(1, 10**6).endswith(" available, 1 MB of shared memory needed")
    assert "0 loader workers" in preflight.check_memory(0, 5 * 10**12)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_checkpoint_that_is_not_loaded_as_saved_stops_the_run(tiny, image_folder: Path, tmp_path: Path, monkeypatch):
    whole = ModelGroup.load

    def damaging(self: ModelGroup, tensors: dict) -> None:
        whole(self, {**tensors, "fc.bias": tensors["fc.bias"] + 1e-7})

    monkeypatch.setattr(ModelGroup, "load", damaging)
    with pytest.raises(UserError, match="differs from what was saved"):
        run(tiny, image_folder, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_batch_too_small_for_its_norms_is_named(tiny: Recipe, image_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"a step with images of 32 px .*Expected more than 1 value.*--global-b"):
        run(replace(tiny, global_batch_size=1), image_folder, tmp_path / "run")


def test_images_that_use_fewer_than_their_sixteen_bits_are_reported():
    """As microscopes and scanners write them."""
    values = np.arange(64, dtype=np.uint16).reshape(8, 8)
    pictures = [encoded(Image.fromarray(values * scale), format="PNG").tobytes() for scale in (60, 1, 1000)]
    narrow, plain = packed_source(pictures), packed_source(pictures[2:])
    expected = "3 train images decoded; 2 of them use 12 of their 16 bits, and are scaled by these"
    assert preflight.check_images(narrow, "fail") == expected
    assert preflight.check_images(plain, "fail") == "1 train images decoded"
