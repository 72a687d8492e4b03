"""What would stop a run later is said before its first step."""

import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_training import run

from resnet_in1k import checkpoint, preflight
from resnet_in1k.errors import BadImageError, UserError
from resnet_in1k.model import ResNet, weights_to_save
from resnet_in1k.recipes import Recipe
from resnet_in1k.sources import open_source
from resnet_in1k.step import TrainStep

Usage = namedtuple("Usage", "total used free")


def test_it_is_told_and_leaves_nothing(tiny: Recipe, image_folder: Path, tmp_path: Path, capsys):
    run(tiny, image_folder, tmp_path / "run", dry_run=True, workers=1)
    said = capsys.readouterr().out
    for part in (
        "classes       6, with 6 to 7 training and 2 validation images each",
        "images        12 train images decoded; 10 val images decoded",
        " free, ",
        "to be written: 4 checkpoints, the best weights",
        "forward and backward of 8 images in ",
        "saved, loaded and found the same in ",
    ):
        assert part in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["train/ant/0.jpg", "train/fox/5.jpg", "train/cat/5.jpg"])
def test_a_bad_image_at_either_end_or_in_the_middle(tiny, image_folder: Path, tmp_path: Path, place: str):
    data = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (data / place).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{place} cannot be read as an image .*--on-bad-image skip"):
        run(tiny, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "but 1 of them cannot be: " in preflight.check_images(open_source(str(data), "train"), "skip")
    with pytest.raises(BadImageError):
        preflight.check_images(open_source(str(data), "train"), "fail")


def test_a_bad_validation_image_is_told_and_no_more(image_folder: Path, tmp_path: Path):
    data = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (data / "val/ant/0.jpg").write_text("a text")
    told = preflight.check_images(open_source(str(data), "val"), "fail")
    assert told.startswith("10 val images decoded, but 1 of them cannot be: ")
    assert "val/ant/0.jpg (no known image format)" in told


def test_too_small_a_disk(tiny: Recipe, image_folder: Path, tmp_path: Path, monkeypatch):
    """ResNet-18 with 6 classes has 11.18 million parameters, 44.8 MB with its buffers; momentum as much again."""
    needed = 4 * (44.78 + 44.72) + 2 * 44.78
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, int((needed - 5) * 1e6)))
    with pytest.raises(UserError, match=r"has too little room: 443 MB free, 447 MB to be written.*--keep-checkpoints"):
        run(tiny, image_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, int((needed + 5) * 1e6)))
    run(tiny, image_folder, tmp_path / "run", dry_run=True)


def test_what_lies_there_already_needs_no_room(tmp_path: Path, monkeypatch):
    model = ResNet("resnet18", 6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 400 * 10**6))
    with pytest.raises(UserError, match="too little room"):
        preflight.check_disk(tmp_path, tmp_path / "checkpoints", model, keep_checkpoints=2)
    (tmp_path / "checkpoints/step_00000004").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00000004/model.safetensors").write_bytes(bytes(90 * 10**6))
    assert "357 MB to be written" in preflight.check_disk(tmp_path, tmp_path / "checkpoints", model, keep_checkpoints=2)


def test_workers_need_memory_and_semaphores(monkeypatch):
    assert "2 MB of memory to share" in preflight.check_workers(1, batch_size=160, image_size=32)
    with pytest.raises(UserError, match=r"too little for 999 loader workers: 770\.\d GB of memory .*fewer --workers"):
        preflight.check_workers(999, batch_size=1280, image_size=224)

    def no_semaphore(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    context = preflight.multiprocessing.get_context("fork")
    monkeypatch.setattr(type(context), "Lock", no_semaphore)
    with pytest.raises(UserError, match=r"no semaphore to be had \(No space left on device\).*/dev/shm"):
        preflight.check_workers(1, batch_size=8, image_size=32)
    assert preflight.check_workers(0, batch_size=8, image_size=32).startswith("none")


def test_the_rehearsal_is_forgotten(tiny: Recipe):
    step = TrainStep(tiny, 6, Accelerator(cpu=True))
    before = weights_to_save(step.model)
    with step.rehearsal():
        step(torch.randn(8, 3, 32, 32), torch.arange(8) % 6, lr=1.0)
        assert not torch.equal(before["fc.weight"], step.model.fc.weight)
        assert len(step.optimizer.state) == len(list(step.model.parameters()))
    after = weights_to_save(step.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not step.optimizer.state
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_what_is_not_loaded_as_it_was_saved_stops_the_run(tiny, image_folder: Path, tmp_path: Path, monkeypatch):
    whole = checkpoint.load_strictly

    def forgetful(model: torch.nn.Module, state: dict, file: Path) -> None:
        whole(model, {**state, "fc.bias": state["fc.bias"] + 1e-7}, file)

    monkeypatch.setattr(checkpoint, "load_strictly", forgetful)
    with pytest.raises(UserError, match="is not what was loaded from it"):
        run(tiny, image_folder, tmp_path / "run")


def test_a_batch_too_small_for_its_norms_is_named(tiny: Recipe, image_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"a step of 1 images of 32 px .*Expected more than 1 value.*--global-b"):
        run(replace(tiny, global_batch_size=1), image_folder, tmp_path / "run")
