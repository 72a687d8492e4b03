"""Commands and steps on an accelerator: that of this machine or, without one, an emulated one.

Training, a kill, a resume, evaluation, prediction and benchmarks; and one step of every recipe and every part of one.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import emulated_accelerator as emulation
from helpers.emulated_accelerator import Race, emulated
from helpers.host_waits import HostWaits
from helpers.loading import specs_of, train_loader
from helpers.processes import ROOT, SLOW, at
from helpers.training import TINY, losses, narrow_resnet18, reset_accelerate_state, rewind, run, small_version

from resnet_in1k.augment.operations import OPERATIONS
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.cli.benchmark import BenchmarkOptions, benchmark
from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.cli.predict import PredictOptions, predict
from resnet_in1k.data.loader import Batch, prefetch_to_device
from resnet_in1k.data.registry import open_source
from resnet_in1k.model.layers import synchronize_norms
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.optim.losses import LOSSES
from resnet_in1k.optim.optimizers import OPTIMIZERS
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train import preflight, trainer
from resnet_in1k.train.step import MovingAverage, TrainStep
from resnet_in1k.train.teacher import Teacher
from resnet_in1k.utils.device import device_type, missing_capabilities
from resnet_in1k.utils.distributed import make_accelerator
from resnet_in1k.utils.errors import ProcessError
from resnet_in1k.utils.launch import Launch

IS_REAL = device_type() != "cpu"
pytestmark = pytest.mark.skipif(not IS_REAL and not emulation.IS_SUPPORTED, reason="torch 2.14 emulates a device")
emulated_only = pytest.mark.skipif(IS_REAL, reason="seen on the emulated device only")
BARE = replace(
    TINY, **{field: 0.0 for operation in OPERATIONS for field in operation.fields}, weight_decay=1e-4, momentum=0.9
)
"""Without augmentation."""
SAVES = {"checkpoint_every": 3, "keep_checkpoints": 9}


@pytest.fixture(autouse=True)
def narrow() -> Iterator[None]:
    with narrow_resnet18():
        yield


@pytest.fixture
def device() -> Iterator[torch.device]:
    with contextlib.nullcontext() if IS_REAL else emulated():
        yield torch.device(device_type())


@pytest.fixture(scope="module")
def on_cpu(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """TINY on the CPU, also on a machine with another device."""
    with pytest.MonkeyPatch.context() as environment, narrow_resnet18():
        environment.setenv("ACCELERATE_USE_CPU", "true")
        return run(TINY, image_folder, tmp_path_factory.mktemp("cpu") / "run")


@pytest.fixture(scope="module")
def on_device(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """TINY on the accelerator."""
    with contextlib.nullcontext() if IS_REAL else emulated(), narrow_resnet18():
        return run(
            TINY, image_folder, tmp_path_factory.mktemp("device") / "run", checkpoint_every=3, keep_checkpoints=9
        )


def assert_same_losses(result: RunFolder, expected: RunFolder) -> None:
    """Compare losses, to the last digit on the emulated device."""
    assert len(losses(result)) == len(losses(expected))
    assert losses(result) == (pytest.approx(losses(expected), rel=0.02) if IS_REAL else losses(expected))


def test_the_device_has_all_capabilities(device: torch.device):
    assert missing_capabilities(device.type) == []


def observe_steps(recipe: Recipe, source: Path, precision: str = "fp32", num_parts: int = 1) -> HostWaits:
    """Take three steps as training does, from the loader to the average; return what the third does."""
    reset_accelerate_state()
    accelerator, images = make_accelerator(Launch(), precision), open_source(str(source), "train")
    counts = StepCounts(replace(recipe, ema_every_steps=1), 1, num_parts, len(images))
    teacher = Teacher(ResNet("resnet18", 6), (0.5,) * 3, (0.5,) * 3) if recipe.teacher_weight else None
    how = {"gradient_accumulation_steps": num_parts, "frozen_steps": counts.frozen_steps, "teacher": teacher}
    step = TrainStep(recipe, 6, accelerator, **how)
    average = MovingAverage(step.plain_copy(), counts) if recipe.ema_decay else None
    augmentation = Augmentation(recipe, 6, draw_for_step=step.draw)
    with train_loader(images, recipe) as batches:
        prefetched = prefetch_to_device(
            batches.batches(specs_of(images, recipe, 3)), accelerator.device, augmentation.apply_to
        )
        for number in (1, 2, 3):
            with HostWaits() as counted:
                _, take = next(prefetched)
                batch, targets, *drawn = take()
                loss = step(batch, targets, 0.01, number, *drawn)
                if average is not None:
                    average.update(step.model, number)
    assert loss.isfinite().item()
    return counted


def assert_no_waits(counted: HostWaits, recipe: Recipe) -> None:
    """One copy is the batch, and one all draws."""
    assert not counted.waits
    draws = bool(recipe.stochastic_depth) or any(getattr(recipe, each) for op in OPERATIONS for each in op.fields)
    assert counted.copies.total() == 1 + draws, counted.copies


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_a_recipe_waits_for_nothing(name: str, device: torch.device, image_folder: Path):
    recipe, how = small_version(name)
    counted = observe_steps(recipe, image_folder, num_parts=how["gradient_accumulation_steps"])
    assert_no_waits(counted, recipe)


PARTS = {
    **{f"optimizer {name}": {"optimizer": name} for name in OPTIMIZERS},
    **{f"loss {name}": {"loss": name} for name in LOSSES},
    **{f"operation {each.name}": dict.fromkeys(each.fields, 0.2) for each in OPERATIONS},
    "clipped": {"max_grad_norm": 1.0},
    "stochastic depth": {"stochastic_depth": 0.1},
    "average": {"ema_decay": 0.9},
    "teacher": {"teacher_weight": 0.5},
}


@pytest.mark.parametrize("name", PARTS)
def test_a_step_with_one_part_waits_for_nothing(name: str, device: torch.device, image_folder: Path):
    recipe = replace(BARE, **PARTS[name])
    assert_no_waits(observe_steps(recipe, image_folder), recipe)


@pytest.mark.parametrize(("precision", "num_waits"), [("bf16", 0), ("fp16", 1)])
def test_a_step_in_low_precision(precision: str, num_waits: int, device: torch.device, image_folder: Path):
    """The scaler of fp16 reads once whether a gradient is not finite."""
    counted = observe_steps(replace(TINY, max_grad_norm=1.0), image_folder, precision)
    assert (counted.waits.total(), counted.copies.total()) == (num_waits, 2), counted


def test_synchronized_norms_wait_for_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """Compute as one of two processes; the other one has the same sums."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.mul_(2))
    norms = torch.nn.BatchNorm2d(4)
    synchronize_norms(torch.nn.Sequential(norms))
    images = torch.randn(2, 4, 3, 3)
    expected = torch.nn.BatchNorm2d(4)(images)
    norms, images = norms.to(device), images.to(device)
    with HostWaits() as counted:
        normalized = norms(images)
        normalized.sum().backward()
    assert not counted.waits
    torch.testing.assert_close(normalized.cpu(), expected)


def test_a_wait_in_the_step_is_found(device: torch.device, image_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Put in on purpose: `.item()` on the loss of each step."""
    plain = TrainStep.__call__

    def reads_the_loss(self: TrainStep, *batch: object) -> torch.Tensor:
        loss = plain(self, *batch)
        loss.item()
        return loss

    monkeypatch.setattr(TrainStep, "__call__", reads_the_loss)
    counted = observe_steps(TINY, image_folder)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense at .*test_accelerator\.py"):
        assert_no_waits(counted, TINY)


WAYS_TO_WAIT = {
    "mask": lambda values: values[values > 0],
    "index of the CPU": lambda values: values[torch.arange(3)],
    "number of a list": lambda values: values * torch.tensor([1.0, 2.0, 3.0], device=values.device),
    "copied to the CPU": lambda values: values.cpu(),
    "not pinned": lambda values: values.add_(torch.ones(3).to(values.device, non_blocking=True)),
    "pinned, but blocking": lambda values: values.add_(torch.ones(3).pin_memory().to(values.device)),
}


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
def test_other_ways_to_wait_are_found(way: str, device: torch.device):
    values = torch.ones(3, device=device)
    with HostWaits() as counted:
        WAYS_TO_WAIT[way](values)
    assert counted.waits.total() == 1


FAULTS = {
    "wait for the side stream": (emulation.Stream, "wait_stream", "has not waited for"),
    "record_stream": (torch.Tensor, "record_stream", "freed without record_stream"),
}


@emulated_only
@pytest.mark.parametrize("missing", FAULTS)
def test_a_fault_between_streams_is_found(missing: str, image_folder: Path):
    """Put in on purpose: a step that does not wait for the side stream, or does not say that it uses its memory."""
    owner, method, words = FAULTS[missing]
    with emulated(), patch.object(owner, method, lambda *_: None), pytest.raises(Race, match=words):
        observe_steps(TINY, image_folder)


@pytest.mark.slow
def test_training_has_the_losses_of_the_cpu(on_device: RunFolder, on_cpu: RunFolder):
    assert_same_losses(on_device, on_cpu)
    result, expected = (json.loads(folder.evaluation.read_text()) for folder in (on_device, on_cpu))
    assert result["loss"] == pytest.approx(expected["loss"], rel=0.02 if IS_REAL else 1e-5)


@pytest.mark.slow
def test_a_resumed_run_ends_as_if_never_interrupted(
    device, image_folder: Path, on_device: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Resume within an epoch. Another number of CPU threads changes nothing, because the CPU does not compute."""
    copy = rewind(on_device, 3, tmp_path / "run")
    recorded = json.loads(copy.recipe.read_text())
    copy.recipe.write_text(json.dumps({**recorded, "cpu_threads": 99}))
    run(TINY, image_folder, copy.path, resume=True, **SAVES)
    assert_same_losses(copy, on_device)
    assert "bits will differ" not in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_and_prediction_are_those_of_the_cpu(
    device: torch.device, on_cpu: RunFolder, image_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def evaluate_and_predict() -> tuple[int, float, list[float]]:
        reset_accelerate_state()
        evaluation = evaluate(EvalOptions(ckpt=str(on_cpu.path), workers=0))
        options = PredictOptions(ckpt=str(on_cpu.path), images=(image_folder / "val",), workers=0)
        found = predict(options, report=lambda text: None)
        probabilities = [best["probability"] for each in found for best in each["predictions"]]
        return evaluation.counts["top1_correct"], evaluation.loss, probabilities

    with HostWaits() as counted:
        result = evaluate_and_predict()
    # The host waits for four arrays of the evaluation, and for the probabilities and the indices of the prediction.
    assert (counted.waits - counted.copies).total() == 4 + 2, counted.waits - counted.copies
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    expected = evaluate_and_predict()
    assert result[0] == expected[0]
    assert result[1:] == (pytest.approx(expected[1], rel=1e-4), pytest.approx(expected[2], rel=1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["input", "step", "train"])
def test_benchmark(what: str, device: torch.device, image_folder: Path):
    recipe = replace(RECIPES["a2"].recipe, model="resnet18", image_size=32)
    how = {"batch_size": 4, "steps": 1, "repetitions": 1, "workers": 1, "recipe": recipe}
    result = benchmark(BenchmarkOptions(what=what, data=str(image_folder), **how))
    assert result["ours"] > 0
    assert result["ratio"] > 0


@emulated_only
@pytest.mark.slow
def test_out_of_memory_is_found_before_training_and_the_cure_works(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Train with a little less memory than a step needs."""
    for module in (preflight, trainer):  # else validation's batch would be the largest
        monkeypatch.setattr(module, "EVAL_BATCH_SIZE", 2)
    recipe = replace(TINY, epochs=1, global_batch_size=16)
    with emulated(limit=1e12):
        run(recipe, image_folder, tmp_path / "unlimited")
        limit = 0.97 * emulation.peak_bytes()
    cure = r"out of memory with 16 images in a forward pass \(npu out .*--gradient-accumulation-steps 2 makes it 8 "
    with emulated(limit), pytest.raises(ProcessError, match=cure):
        run(recipe, image_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with emulated(limit):
        folder = run(recipe, image_folder, tmp_path / "run", resume=True, gradient_accumulation_steps=2)
    assert len(losses(folder)) == 2


KILLED = """
import sys
sys.path[:0] = [".", "tests"]
from helpers.emulated_accelerator import emulated
from helpers.training import narrow_resnet18
from resnet_in1k.cli import train
with emulated(), narrow_resnet18():
    train.main()
"""


@emulated_only
@pytest.mark.slow
def test_a_killed_run_resumes(image_folder: Path, on_device: RunFolder, tmp_path: Path):
    """A process of its own with a loader worker, killed (-9) in the second epoch; then resumed, in this process."""
    flags = [*SLOW, "--checkpoint-every=3", "--data", str(image_folder), "--output-dir", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, *flags], cwd=ROOT, env=environment, **pipes)
    _, errors = at(process, "epoch 2/2  step", process.kill)
    assert process.returncode == -9, errors
    with emulated():
        run(TINY, image_folder, tmp_path / "run", resume=True, **SAVES)
    assert_same_losses(RunFolder(tmp_path / "run"), on_device)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_close_to_float32(precision: str, device, image_folder: Path, on_cpu, tmp_path: Path):
    folder = run(replace(TINY, epochs=1), image_folder, tmp_path / "run", precision=precision)
    assert losses(folder)[:3] != losses(on_cpu)[:3]
    assert losses(folder)[:3] == pytest.approx(losses(on_cpu)[:3], rel=0.03)
    state = json.loads((folder.checkpoints / "step_00000004/state.json").read_text())
    assert (state["grad_scaler"] is not None) == (precision == "fp16")


@pytest.mark.slow
@pytest.mark.skipif(not IS_REAL, reason="torch compiles nothing within the modes of the emulation")
def test_compiling(device, image_folder: Path, on_cpu, tmp_path: Path):
    folder = run(replace(TINY, epochs=1), image_folder, tmp_path / "run", compile=True)
    assert losses(folder) == pytest.approx(losses(on_cpu)[:4], rel=1e-4)


def test_the_numbers_of_a_batch_do_not_keep_its_images(device: torch.device):
    """Evaluation keeps the indices of all batches on the device until its end."""
    images = torch.arange(2 * 5 * 5 * 3, dtype=torch.uint8).view(2, 5, 5, 3)  # 150 bytes: no multiple of 8
    batch = Batch.pack(images, np.array([3, 4]), [5, 6], 1, {})
    copy = batch.to(device)
    assert (copy.labels._base, copy.indices._base) == (None, None)
    assert (copy.labels.tolist(), copy.indices.tolist()) == ([3, 4], [5, 6])
    assert torch.equal(copy.images.cpu(), images.permute(0, 3, 1, 2))
    assert copy.images.is_contiguous(memory_format=torch.channels_last)
