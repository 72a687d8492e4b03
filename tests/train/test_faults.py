"""What a user sees when disks, memory, data or other runs make training fail; earlier checkpoints stay."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from helpers.processes import ROOT, SLOW, TWO_PROCESSES, at, rank_of, start
from helpers.training import run

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.train.checkpoint import list_checkpoints
from resnet_in1k.train.step import TrainStep
from resnet_in1k.utils.errors import ProcessError, UserError

pytestmark = pytest.mark.slow


def test_loss_that_is_not_finite_stops_the_run_with_what_to_try(tiny: Recipe, image_folder: Path, tmp_path: Path):
    recipe = replace(tiny, lr=1e25, warmup_epochs=0)
    how = {"log_every": 100, "checkpoint_every": 1, "keep_checkpoints": 9}
    words = r"the loss of step 2 \(epoch 1, lr 9\.6\d*e\+24\) is nan; nothing was saved since, .*--lr, longer --warmup"
    with pytest.raises(UserError, match=words) as error:
        run(recipe, image_folder, tmp_path / "run", **how)
    assert "\n" not in str(error.value)
    listed = (tmp_path / "run/nonfinite_batch.txt").read_text().splitlines()
    assert len(listed) == 8
    assert all(Path(name).is_file() for name in listed)
    assert [step for step, _ in list_checkpoints(tmp_path / "run/checkpoints")] == [1]
    with pytest.raises(UserError, match=words):  # and whoever goes on all the same goes on from there
        run(recipe, image_folder, tmp_path / "run", resume=True, **how)


def test_two_processes_stop_together_and_the_reason_is_printed_once(image_folder: Path, tmp_path: Path):
    flags = ("--lr", "1e25", "--warmup-epochs", "0")
    _, errors = start(image_folder, tmp_path / "run", *flags, launcher=TWO_PROCESSES).communicate(timeout=120)
    assert len(re.findall(r"^error: the loss of step 2 ", errors, re.M)) == 1
    assert "lost its connection" not in errors
    assert "loop.py" not in errors  # no traceback of ours
    assert len((tmp_path / "run/nonfinite_batch.txt").read_text().splitlines()) == 8


def test_out_of_memory_names_the_batch_and_suggests_accumulation(tiny, image_folder, tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(TrainStep, "__call__", full)
    words = r"out of memory with 8 images in a forward pass .*--gradient-accumulation-steps 2 makes it 4 and keeps"
    with pytest.raises(ProcessError, match=words) as error:
        run(tiny, image_folder, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_disk_that_takes_no_more_stops_the_run_and_leaves_the_checkpoints(
    tiny, image_folder, tmp_path: Path, monkeypatch, number: int
):
    """Full, or gone read-only: at the write layer, at the second epoch's end."""
    whole = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "step_00000008" in str(self):
            whole(self, data[: len(data) // 2])
            raise OSError(number, os.strerror(number))
        return whole(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=rf"step_00000008 cannot be written: {os.strerror(number)}; what was saved"):
        run(tiny, image_folder, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000004"]
    if number != errno.ENOSPC:
        return
    monkeypatch.undo()
    run(tiny, image_folder, tmp_path / "run", resume=True)
    assert len(list_checkpoints(tmp_path / "run/checkpoints")) == 2


def test_quota_met_by_a_real_process_is_one_line(image_folder: Path, tmp_path: Path):
    """The kernel refuses files over 20 MB to this process; a checkpoint has 45."""
    command = [sys.executable, "scripts/train.py", *SLOW, "--data", image_folder, "--output-dir", tmp_path / "run"]
    limit = 20 << 20
    result = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2
    assert re.fullmatch(
        r"error: .*step_00000001 cannot be written: File too large\n", result.stderr
    )  # by the preflight


def test_disk_full_in_mid_run_stops_all_processes_with_one_line(image_folder: Path, tmp_path: Path):
    """From step 5 on the kernel refuses files over 20 MB to the process that writes; a checkpoint has 45."""
    process = start(image_folder, tmp_path / "run", launcher=TWO_PROCESSES)
    limit = (20 << 20, 20 << 20)
    _, errors = at(process, "step 5/8", lambda: rank_of(process, 0).rlimit(psutil.RLIMIT_FSIZE, limit))
    assert process.returncode != 0
    assert (
        len(re.findall(r"^error: .*step_00000008 cannot be written: File too large; what was saved", errors, re.M)) == 1
    )
    assert "lost its connection" not in errors
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000004"]


def test_folder_that_cannot_be_written_to_is_refused_at_once(tiny, image_folder, tmp_path: Path, monkeypatch):
    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match=r"--output-dir .*/run cannot be written to: Read-only file system; choose"):
        run(tiny, image_folder, tmp_path / "run")


def test_vanished_folder_is_not_made_anew(image_folder: Path, tmp_path: Path):
    process = start(image_folder, tmp_path / "run")
    _, errors = at(process, "step 5/8", lambda: shutil.rmtree(tmp_path / "run"))
    assert process.returncode == 2
    assert "cannot be written: No such file or directory" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_second_run_on_the_same_folder_is_refused_while_the_first_lives(image_folder: Path, tmp_path: Path):
    first = start(image_folder, tmp_path / "run")
    refused: list[tuple[int, str]] = []

    def start_second() -> None:
        second = start(image_folder, tmp_path / "run", "--resume")
        _, errors = second.communicate(timeout=120)
        refused.append((second.returncode, errors))

    first.send_signal(0)
    at(first, "step 1/8", lambda: (first.send_signal(19), start_second(), first.send_signal(18)))  # stop, continue
    assert first.returncode == 0
    ((status, errors),) = refused
    assert status == 2
    assert f"is being written to by process {first.pid} on " in errors
    assert errors.count("\n") == 1


def test_tracker_that_fails_is_left_out_and_the_run_goes_on(tiny, image_folder, tmp_path: Path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def lost(*_: object, **__: object) -> None:
        raise ConnectionError("the tracking server is away\nfor long")

    monkeypatch.setattr(TensorBoardTracker, "log", lost)
    folder = run(replace(tiny, epochs=1), image_folder, tmp_path / "run", report_to="tensorboard")
    errors = capsys.readouterr().out
    line = "logging to tensorboard failed (the tracking server is away); it is disabled for the rest of the run\n"
    assert errors.count(line) == 1
    assert len(folder.records()) == 5


def test_tracker_that_cannot_be_started_stops_before_anything_is_begun(tiny, image_folder, tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("no login")

    monkeypatch.setattr(TensorBoardTracker, "start", refused)
    with pytest.raises(UserError, match=r"--report-to: the tracker cannot be started \(no login\); fix that, or omit"):
        run(tiny, image_folder, tmp_path / "run", report_to="tensorboard")
    assert not (tmp_path / "run/recipe.json").exists()


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
)
def test_out_of_memory_suggests_what_divides_the_batch(tiny, image_folder, tmp_path: Path, monkeypatch, message: str):
    """15 images in one part: two parts would be refused."""

    def full(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(TrainStep, "__call__", full)
    with pytest.raises(ProcessError, match=r"with 15 images .*--gradient-accumulation-steps 3 makes it 5 and keeps"):
        run(replace(tiny, global_batch_size=15), image_folder, tmp_path / "run")


def test_out_of_memory_in_evaluation_is_not_blamed_on_the_training_batch(tiny, image_folder, tmp_path, monkeypatch):
    from resnet_in1k.model.resnet import ResNet

    whole = ResNet.forward

    def full(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        if not self.training and len(images) > 1:  # one, on a CPU, is the smoke test's
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, images)

    monkeypatch.setattr(ResNet, "forward", full)
    with pytest.raises(
        ProcessError, match=r"out of memory with 12 images in a forward pass for evaluation .*--image-size"
    ):
        run(tiny, image_folder, tmp_path / "run")


def test_out_of_memory_before_there_is_a_plan(tiny, image_folder, tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TrainStep, "__init__", full)
    with pytest.raises(ProcessError, match=r"out of memory before the first step .*something else use this device\?"):
        run(tiny, image_folder, tmp_path / "run")


def test_names_that_are_no_utf8_do_not_end_the_run(tiny: Recipe, image_folder: Path, tmp_path: Path, capfd):
    """A class and an unreadable validation image, as an old archive has them."""
    data = tmp_path / "images"
    shutil.copytree(image_folder, data)
    for split in ("train", "val"):
        os.rename(data / split / "eel", os.fsencode(data / split) + b"/anguila_\xf1")
    (data / "val" / os.fsdecode(b"anguila_\xf1") / os.fsdecode(b"9_\xf1.jpg")).write_text("no image")
    process = start(data, tmp_path / "run")
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    folder = RunFolder(tmp_path / "run")
    assert os.fsdecode(b"anguila_\xf1") in read_recipe(folder)[1]["data"]["class_names"]
    assert folder.bad_val_images.read_text().count("9_\\udcf1.jpg (") == 1
    assert "unreadable: " in out
