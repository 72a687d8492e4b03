"""Checks that need an accelerator: the device against the CPU, the host that never waits, and complete runs."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.processes import ROOT, accelerate_launch, at, rank_of
from safetensors.torch import load_file

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.loader import Batch, prefetch_to_device
from resnet_in1k.data.registry import open_source
from resnet_in1k.evaluate.evaluation import EvalLoader, evaluate_model, padded, predict_batch
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.step import TrainStep
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.device import device_type, reproducible_float32
from resnet_in1k.utils.distributed import make_accelerator
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.timing import Stopwatch, synchronize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_type() == "cpu", reason="no GPU or other accelerator here: its tests are skipped"),
]

RECIPE = replace(RECIPES["tutorial"].recipe, global_batch_size=64)
"""ResNet-50 at 224 px, with every augmentation of the tutorial."""
SMALL = ("--recipe", "demo", "--model", "resnet18", "--epochs", "2", "--log-every", "1", "--workers", "2")
FEW_STEPS = (*SMALL, "--global-batch-size", "256", "--lr", "0.02")
"""Ten steps on the digits, each logged."""
SAME_LOSS = 0.02
"""Relative difference of losses after a resume, where a device does not add in a fixed order."""


@pytest.fixture
def accelerator() -> Accelerator:
    return make_accelerator(Launch())


@pytest.fixture
def device(accelerator: Accelerator) -> torch.device:
    return accelerator.device


def images(seed: int = 0) -> torch.Tensor:
    """(B, 3, S, S) uint8 in channels_last, on the CPU."""
    shape = (RECIPE.global_batch_size, RECIPE.image_size, RECIPE.image_size, 3)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


LABELS = torch.arange(RECIPE.global_batch_size)


def batches(numbers: range) -> Iterator[Batch]:
    """Batches like the loader's: in pinned memory, if the device has it."""
    for number in numbers:
        yield Batch.pack(images(number).permute(0, 2, 3, 1), LABELS.numpy(), LABELS.tolist(), number, {})


def test_augmentation_equals_the_cpus(device: torch.device):
    """Values differ by at most one gray level, except where rounding selects the next pixel of a rotation."""
    augmentation = Augmentation(RECIPE, num_classes=1000)
    ours, _ = augmentation(images().to(device), LABELS.to(device), 1)
    reference, _ = augmentation(images(), LABELS, 1)
    levels = torch.tensor(imagenet.STD).view(3, 1, 1) * 255
    assert (((ours.cpu() - reference).abs() * levels) > 1).double().mean() < 1e-3


def test_prefetching_keeps_every_byte(device: torch.device):
    """The compute stream allocates, frees and is busy meanwhile."""
    given, kept = list(batches(range(12))), []
    square = torch.randn(4096, 4096, device=device)

    def prepare(batch: Batch) -> tuple[torch.Tensor, ...]:
        return (batch.images + torch.zeros_like(batch.images),)  # memory of the side stream, used and freed there

    for _, take in prefetch_to_device(given, device, prepare):
        (prepared,) = take()
        for _ in range(4):
            square = (square @ square).tanh()  # keeps the device behind the host
        kept.append(prepared.clone())
        del prepared
        torch.full((images().nbytes,), 255, dtype=torch.uint8, device=device)  # takes the freed memory
    assert all(torch.equal(ours.cpu(), batch.images) for ours, batch in zip(kept, given, strict=True))


def test_the_stopwatch_measures_the_device(device: torch.device):
    """Compared with the host's clock around work that the host waits for."""
    stopwatch, square = Stopwatch(device), torch.randn(4096, 4096, device=device)

    def work() -> None:
        for _ in range(20):
            torch.mm(square, square)

    work()
    synchronize(device)
    start_seconds = time.perf_counter()
    with stopwatch.section("train"):
        work()
    synchronize(device)
    assert 0.5 < stopwatch.lap()["train"] / (time.perf_counter() - start_seconds) < 1.1


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(device_type() != "cuda", reason="only CUDA reports when the host waits")
def test_the_host_never_waits_between_two_lines_of_the_log(accelerator: Accelerator):
    """Copy, augmentation and training step; and evaluation. The loss scaler of fp16 waits by design."""
    device = accelerator.device
    step, augmentation = TrainStep(RECIPE, 1000, accelerator), Augmentation(RECIPE, 1000)
    model, stopwatch = step.plain_copy().eval(), Stopwatch(device)

    def train(numbers: range) -> None:
        prefetched = prefetch_to_device(batches(numbers), device, augmentation.apply_to)
        for number in numbers:
            with stopwatch.section("load"):
                _, take = next(prefetched)
            with stopwatch.section("train"):
                step(*take(), 0.01, number)

    def evaluate(numbers: range) -> None:
        with torch.inference_mode(), reproducible_float32():
            for batch in batches(numbers):
                on_device = batch.to(device)
                predict_batch(model, normalize(on_device.images), on_device.labels, on_device.indices)

    for work in (train, evaluate):
        work(range(1, 3))  # chooses kernels and makes constants
    with waiting_is_an_error():
        for work in (train, evaluate):
            work(range(3, 6))


def test_a_prediction_does_not_depend_on_its_batch(device: torch.device):
    """The same images in a full batch, and in a padded one: equal bits."""
    model = ResNet(RECIPE.model).to(device, memory_format=torch.channels_last).eval()
    on_device, labels = images().to(device), LABELS.to(device)
    few = len(on_device) // 4
    with torch.inference_mode(), reproducible_float32():
        full = predict_batch(model, normalize(on_device), labels, labels)
        part = predict_batch(model, normalize(padded(on_device[:few], len(on_device))), labels[:few], labels[:few])
    assert [name for name in part if not torch.equal(full[name][:few], part[name])] == []


def test_evaluation_uses_full_batches_only(accelerator: Accelerator):
    """355 digits: three batches of 128, the last one padded; counts do not depend on it."""
    source, preprocessing = open_source("digits", "val"), EvalPreprocessing(32, 36)
    model = ResNet("resnet18", 10).to(accelerator.device, memory_format=torch.channels_last)
    sizes: list[int] = []
    model.fc.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    evaluations = []
    for batch_size in (128, 355):
        with EvalLoader(source, preprocessing, batch_size, workers=0) as loader:
            evaluations.append(evaluate_model(model, loader, accelerator))
    assert sizes == [128, 128, 128, 355]
    assert evaluations[0].counts["num_images"] == 355
    first, second = (evaluation.counts["top1_correct"] for evaluation in evaluations)
    assert abs(first - second) <= 1  # rounding, for two close classes


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in RunFolder(folder).records() if record["kind"] == "train"}


@pytest.fixture
def train(run_script: Callable, tmp_path: Path) -> Callable[..., Path]:
    """Train by scripts/train.py, which must succeed; return the run folder."""

    def run(name: str, *flags: str, config: str | None = None) -> Path:
        result = run_script("scripts/train.py", "--output-dir", tmp_path / name, *flags, config=config)
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_each_precision_trains(train: Callable[..., Path], precision: str):
    logged = losses(train("run", *FEW_STEPS, "--precision", precision))
    assert logged[max(logged)] < logged[min(logged)]


def test_a_killed_run_resumes(train: Callable[..., Path], tmp_path: Path):
    """Killed (-9) in the second epoch and resumed: the losses of a run that was not interrupted."""
    flags = (*FEW_STEPS, "--precision", "fp32", "--checkpoint-every", "2")
    uninterrupted = losses(train("uninterrupted", *flags))
    command = [sys.executable, "scripts/train.py", "--output-dir", str(tmp_path / "killed"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes)
    at(process, "epoch 2/2  step", process.kill)
    assert process.returncode == -9
    resumed = losses(train("killed", *flags, "--resume"))
    assert resumed.keys() == uninterrupted.keys()
    assert all(resumed[step] == pytest.approx(loss, rel=SAME_LOSS) for step, loss in uninterrupted.items())


def test_out_of_memory_names_a_cure(run_script: Callable, tmp_path: Path):
    """About a gigabyte of activations per image."""
    large = ("--model", "resnet152", "--image-size", "512", "--global-batch-size", "512")
    result = run_script("scripts/train.py", *SMALL, *large, "--output-dir", tmp_path / "run")
    assert result.returncode == 2
    last_line = result.stderr.strip().splitlines()[-1]
    assert "out of memory" in last_line
    assert "--gradient-accumulation-steps" in last_line


def test_nothing_is_saved_after_a_loss_that_is_not_finite(run_script: Callable, tmp_path: Path):
    diverging = ("--lr", "1e30", "--warmup-epochs", "0", "--checkpoint-every", "1")
    result = run_script("scripts/train.py", *FEW_STEPS, *diverging, "--output-dir", tmp_path / "run")
    assert result.returncode == 2, result.stderr
    assert "loss" in result.stderr.strip().splitlines()[-1]
    assert (tmp_path / "run/nonfinite_batch.txt").is_file()
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file


def test_the_demo_reaches_its_accuracy(train: Callable[..., Path]):
    result = json.loads((train("demo", "--recipe", "demo") / "eval.json").read_text())
    assert result["top1_accuracy"] >= 0.97


@pytest.mark.skipif(
    device_type() == "cpu" or torch.accelerator.device_count() < 2, reason="fewer than two GPUs: NCCL is not tested"
)
def test_two_gpus_train_as_one_does_stop_resume_and_evaluate(train: Callable[..., Path], run_script, tmp_path: Path):
    """Under NCCL; one process gets a signal in the second epoch, and the run is resumed."""
    one = losses(train("one", *FEW_STEPS, "--precision", "fp32"))
    two = losses(train("two", *FEW_STEPS, "--precision", "fp32", config="two_gpu.yaml"))
    assert two.keys() == one.keys()
    assert two[1] == pytest.approx(one[1], rel=SAME_LOSS)
    assert two[max(two)] < two[1]
    flags = ("--output-dir", str(tmp_path / "stopped"), *FEW_STEPS, "--precision", "fp32")
    command = [sys.executable, *accelerate_launch("two_gpu.yaml"), "scripts/train.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes)
    _, errors = at(process, "epoch 2/2  step", lambda: rank_of(process, 1).terminate())
    assert "everything is saved" in errors
    assert (
        losses(train("stopped", *FEW_STEPS, "--precision", "fp32", "--resume", config="two_gpu.yaml")).keys()
        == two.keys()
    )
    result = run_script("scripts/evaluate.py", "--ckpt", tmp_path / "stopped", config="two_gpu.yaml")
    assert result.returncode == 0, result.stderr
