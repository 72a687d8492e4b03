"""What a user sees when disks, memory, data and other runs get in the way; earlier checkpoints stay."""

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
from processes import ROOT, SLOW, TWO_PROCESSES, at, rank_of, start
from test_training import run

from resnet_in1k import files
from resnet_in1k.checkpoint import list_checkpoints
from resnet_in1k.errors import ProcessError, UserError
from resnet_in1k.pipeline import worker_deaths_explained
from resnet_in1k.recipes import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.step import TrainStep


def test_a_loss_that_is_not_finite_stops_the_run_with_what_to_try(tiny: Recipe, image_folder: Path, tmp_path: Path):
    recipe = replace(tiny, lr=1e25, warmup_epochs=0)
    how = {"log_every": 100, "checkpoint_every": 1, "keep_checkpoints": 9}
    words = (
        r"the loss of step 2 \(epoch 1, lr 9\.6\d*e\+24\) is nan; the weights were not touched .*--lr, longer --warmup"
    )
    with pytest.raises(UserError, match=words) as error:
        run(recipe, image_folder, tmp_path / "run", **how)
    assert "\n" not in str(error.value)
    listed = (tmp_path / "run/nonfinite_batch.txt").read_text().splitlines()
    assert len(listed) == 8
    assert all(Path(name).is_file() for name in listed)
    assert [step for step, _ in list_checkpoints(tmp_path / "run/checkpoints")] == [1]
    with pytest.raises(UserError, match=words):  # and whoever goes on all the same goes on from there
        run(recipe, image_folder, tmp_path / "run", resume=True, **how)


def test_two_processes_stop_together_and_the_reason_is_said_once(image_folder: Path, tmp_path: Path):
    flags = ("--lr", "1e25", "--warmup-epochs", "0")
    _, said = start(image_folder, tmp_path / "run", *flags, launcher=TWO_PROCESSES).communicate(timeout=120)
    assert len(re.findall(r"^error: the loss of step 2 ", said, re.M)) == 1
    assert "lost the others" not in said
    assert "training.py" not in said  # no traceback of ours
    assert len((tmp_path / "run/nonfinite_batch.txt").read_text().splitlines()) == 8


def test_out_of_memory_names_the_batch_and_suggests_accumulation(tiny, image_folder, tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(TrainStep, "__call__", full)
    words = r"out of memory with 8 images in a forward pass .*--gradient-accumulation-steps 2 makes it 4 and leaves"
    with pytest.raises(ProcessError, match=words) as error:
        run(tiny, image_folder, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_takes_no_more_stops_the_run_and_leaves_the_checkpoints(
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


def test_a_quota_met_by_a_real_process_is_one_line(image_folder: Path, tmp_path: Path):
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


@pytest.mark.parametrize("launcher", [(), TWO_PROCESSES], ids=["one process", "two processes"])
def test_a_disk_full_in_mid_run_stops_all_processes_with_one_line(image_folder: Path, tmp_path: Path, launcher):
    """From step 5 on the kernel refuses files over 20 MB to the process that writes; a checkpoint has 45."""
    process = start(image_folder, tmp_path / "run", launcher=launcher)
    limit = (20 << 20, 20 << 20)
    _, said = at(process, "step 5/8", lambda: rank_of(process, 0).rlimit(psutil.RLIMIT_FSIZE, limit))
    assert process.returncode != 0
    assert (
        len(re.findall(r"^error: .*step_00000008 cannot be written: File too large; what was saved", said, re.M)) == 1
    )
    assert "lost the others" not in said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000004"]


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tiny, image_folder, tmp_path: Path, monkeypatch):
    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match=r"--output-dir .*/run cannot be written to: Read-only file system; choose"):
        run(tiny, image_folder, tmp_path / "run")


def test_a_vanished_folder_is_not_made_anew(image_folder: Path, tmp_path: Path):
    process = start(image_folder, tmp_path / "run")
    _, said = at(process, "step 5/8", lambda: shutil.rmtree(tmp_path / "run"))
    assert process.returncode == 2
    assert "cannot be written: No such file or directory" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_second_run_on_the_same_folder_is_refused_while_the_first_lives(image_folder: Path, tmp_path: Path):
    first = start(image_folder, tmp_path / "run")
    refused: list[tuple[int, str]] = []

    def start_second() -> None:
        second = start(image_folder, tmp_path / "run", "--resume")
        _, said = second.communicate(timeout=120)
        refused.append((second.returncode, said))

    first.send_signal(0)
    at(first, "step 1/8", lambda: (first.send_signal(19), start_second(), first.send_signal(18)))  # stop, continue
    assert first.returncode == 0
    ((status, said),) = refused
    assert status == 2
    assert f"is being written to by process {first.pid} on " in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("number", "calls"), [(errno.EIO, 2), (errno.ESTALE, 2), (errno.EDQUOT, 1), (errno.EACCES, 1)])
def test_what_fails_in_passing_is_tried_once_more(number: int, calls: int):
    called = []

    def write() -> None:
        called.append(1)
        raise OSError(number, os.strerror(number), "a/file")

    assert files.why_not(write) == f"a/file cannot be written: {os.strerror(number)}"
    assert len(called) == calls


def test_a_second_try_that_succeeds_is_no_fault():
    errors = [OSError(errno.EIO, "once")]
    assert files.why_not(lambda: (_ for _ in ()).throw(errors.pop()) if errors else None) is None


def test_weights_that_have_diverged_are_told(image_folder: Path, tmp_path: Path, tiny: Recipe):
    from accelerate import Accelerator

    from resnet_in1k.evaluation import evaluate_model
    from resnet_in1k.model import ResNet
    from resnet_in1k.sources import open_source

    model = ResNet("resnet18", 6)
    model.fc.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"the loss on .*/val is nan: these weights have diverged"):
        evaluate_model(
            model,
            open_source(str(image_folder), "val"),
            Accelerator(cpu=True),
            image_size=32,
            resize_size=36,
            num_workers=0,
        )


def test_a_workers_death_is_explained_wherever_it_is_heard_of():
    words = r"a loader worker died \(DataLoader worker \(pid 7\) is killed by signal: Killed\); if memory"
    with pytest.raises(ProcessError, match=words), worker_deaths_explained():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="another matter"), worker_deaths_explained():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0. another matter")


def test_the_lock_is_gone_with_the_process(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    code = f"""
import os
from pathlib import Path
from resnet_in1k.run_folder import RunFolder, RunLock
lock = RunLock(RunFolder(Path({str(folder.path)!r})))
os.kill(os.getpid(), 9)
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).returncode == -9


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tiny, image_folder, tmp_path: Path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def lost(*_: object, **__: object) -> None:
        raise ConnectionError("the tracking server is away\nfor long")

    monkeypatch.setattr(TensorBoardTracker, "log", lost)
    folder = run(replace(tiny, epochs=1), image_folder, tmp_path / "run", report_to="tensorboard")
    said = capsys.readouterr().out
    assert said.count("tensorboard has failed, and is left out from here on (the tracking server is away)\n") == 1
    assert len(folder.records()) == 5


def test_a_tracker_that_cannot_be_started_stops_before_anything_is_begun(tiny, image_folder, tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("no login")

    monkeypatch.setattr(TensorBoardTracker, "start", refused)
    with pytest.raises(
        UserError, match=r"--report-to: the tracker cannot be started \(no login\); mend that, or leave"
    ):
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
    with pytest.raises(ProcessError, match=r"with 15 images .*--gradient-accumulation-steps 3 makes it 5 and leaves"):
        run(replace(tiny, global_batch_size=15), image_folder, tmp_path / "run")


def test_out_of_memory_in_evaluation_is_not_blamed_on_the_training_batch(tiny, image_folder, tmp_path, monkeypatch):
    from resnet_in1k.model import ResNet

    whole = ResNet.forward

    def full(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        if not self.training and len(images) > 1:  # one, on a CPU, is the rehearsal's
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


def test_names_that_are_no_utf8_end_no_run(tiny: Recipe, image_folder: Path, tmp_path: Path, capfd):
    """A class and an unreadable validation image, as an old archive has them."""
    data = tmp_path / "images"
    shutil.copytree(image_folder, data)
    for split in ("train", "val"):
        os.rename(data / split / "eel", os.fsencode(data / split) + b"/anguila_\xf1")
    (data / "val" / os.fsdecode(b"anguila_\xf1") / os.fsdecode(b"9_\xf1.jpg")).write_text("no image")
    process = start(data, tmp_path / "run")
    out, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")
    folder = RunFolder(tmp_path / "run")
    assert os.fsdecode(b"anguila_\xf1") in read_recipe(folder)[1]["data"]["class_names"]
    assert folder.bad_val_images.read_text().count("9_\\udcf1.jpg (") == 1
    assert "unreadable: " in out
