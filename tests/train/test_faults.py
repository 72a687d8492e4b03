"""What a user sees when disks, memory, data or other runs make training fail; earlier checkpoints stay."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from helpers.processes import ROOT, TWO_PROCESSES, accelerate_launch, at, rank_of, start
from helpers.training import run

from resnet_in1k.model.resnet import ResNet
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.train.checkpoint import list_checkpoints
from resnet_in1k.train.step import TrainStep
from resnet_in1k.utils.errors import ProcessError, UserError

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("narrow")
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
    process = start(image_folder, tmp_path / "run", *flags, launcher=accelerate_launch("two_gpu.yaml"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(re.findall(r"^error: the loss of step 2 ", errors, re.M)) == 1
    assert "lost its connection" not in errors
    assert "loop.py" not in errors  # the launcher's report gives the reason, not our code
    assert len((tmp_path / "run/nonfinite_batch.txt").read_text().splitlines()) == 8


def fail(error: BaseException) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("error", "batch_size", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), 8, "steps 2 makes it 4"),
        (RuntimeError("CUDA error: out of memory"), 15, "steps 3 makes it 5"),  # two parts would be refused
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 15, "steps 3 makes it 5"),
    ],
)
def test_out_of_memory_names_the_batch_and_suggests_what_divides_it(
    tiny: Recipe, image_folder: Path, tmp_path: Path, monkeypatch, error: Exception, batch_size: int, words: str
):
    monkeypatch.setattr(TrainStep, "__call__", fail(error))
    advice = rf"with {batch_size} images .*--gradient-accumulation-{words} and keeps"
    with pytest.raises(ProcessError, match=advice) as raised:
        run(replace(tiny, global_batch_size=batch_size), image_folder, tmp_path / "run")
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("narrow")
def test_out_of_memory_in_evaluation_is_not_blamed_on_the_training_batch(tiny, image_folder, tmp_path, monkeypatch):
    whole = ResNet.forward

    def full(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        if not self.training and len(images) == 12:  # the smoke test has more
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, images)

    monkeypatch.setattr(ResNet, "forward", full)
    words = r"out of memory with 12 images in a forward pass .*use a smaller --image-size or"
    with pytest.raises(ProcessError, match=words):
        run(tiny, image_folder, tmp_path / "run")


def test_out_of_memory_before_there_is_a_plan(tiny, image_folder, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(TrainStep, "__init__", fail(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(ProcessError, match=r"^out of memory \(.*something else use this device\?"):
        run(tiny, image_folder, tmp_path / "run")


@pytest.mark.usefixtures("narrow")
def test_disk_that_is_full_stops_the_run_which_resumes_once_there_is_space(tiny, image_folder, tmp_path, monkeypatch):
    """At the second epoch's end."""
    whole = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "step_00000008" in str(self):
            whole(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"step_00000008 cannot be read or written: No space left .*; what was saved"):
        run(tiny, image_folder, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000004"]
    monkeypatch.setattr(Path, "write_bytes", whole)
    run(tiny, image_folder, tmp_path / "run", resume=True)
    assert [step for step, _ in list_checkpoints(tmp_path / "run/checkpoints")] == [4, 8]


def test_disk_full_in_mid_run_stops_all_processes_with_one_line(image_folder: Path, tmp_path: Path):
    """From step 5 on the kernel refuses files over 20 MB to the process that writes; a checkpoint has 45."""
    process = start(image_folder, tmp_path / "run", launcher=TWO_PROCESSES)
    limit = (20 << 20, 20 << 20)
    _, errors = at(process, "step 5/8", lambda: rank_of(process, 0).rlimit(psutil.RLIMIT_FSIZE, limit))
    assert process.returncode != 0
    words = r"^error: .*step_00000008 cannot be read or written: File too large; what was saved"
    assert len(re.findall(words, errors, re.M)) == 1
    assert "lost its connection" not in errors
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000004"]


def test_folder_that_cannot_be_written_to_is_refused_at_once(tiny, image_folder, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", fail(OSError(errno.EROFS, os.strerror(errno.EROFS), "run")))
    with pytest.raises(UserError, match=r"run cannot be read or written: Read-only file system"):
        run(tiny, image_folder, tmp_path / "run")


@pytest.mark.usefixtures("narrow")
def test_vanished_folder_is_not_made_anew(tiny: Recipe, image_folder: Path, tmp_path: Path, monkeypatch):
    whole = RunFolder.append

    def vanish(folder: RunFolder, record: dict) -> None:
        if record["step"] == 5:
            shutil.rmtree(folder.path)
        whole(folder, record)

    monkeypatch.setattr(RunFolder, "append", vanish)
    with pytest.raises(UserError, match="cannot be read or written: No such file or directory"):
        run(tiny, image_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


HOLD_THE_LOCK = """
import sys
from pathlib import Path
from resnet_in1k.utils.files import lock_folder

lock = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("narrow")
def test_second_run_on_the_same_folder_is_refused(tiny: Recipe, image_folder: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, tmp_path / "run"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as first:  # fmt: skip
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"is being written to by process {first.pid} on "):
            run(tiny, image_folder, tmp_path / "run", resume=True)
        first.communicate("end")


@pytest.mark.usefixtures("narrow")
def test_tracker_that_fails_is_left_out_and_the_run_goes_on(tiny, image_folder, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(TensorBoardTracker, "log", fail(ConnectionError("the tracking server is away\nfor long")))
    folder = run(replace(tiny, epochs=1), image_folder, tmp_path / "run", report_to="tensorboard")
    line = "logging to tensorboard failed (the tracking server is away); it is disabled for the rest of the run\n"
    assert capsys.readouterr().out.count(line) == 1
    assert len(folder.records()) == 5


@pytest.mark.usefixtures("narrow")
def test_tracker_that_cannot_be_started_stops_before_anything_is_begun(tiny, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBoardTracker, "start", fail(RuntimeError("no login")))
    with pytest.raises(UserError, match=r"--report-to: the tracker cannot be started \(no login\); fix that, or omit"):
        run(tiny, image_folder, tmp_path / "run", report_to="tensorboard")
    assert not (tmp_path / "run/recipe.json").exists()


def test_names_that_are_no_utf8_do_not_end_the_run(tiny: Recipe, image_folder: Path, tmp_path: Path):
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
