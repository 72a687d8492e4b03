"""Two processes train as one does: norms over both, the same pairs mixed, the same branches skipped, clipped alike."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.processes import ROOT, TWO_PROCESSES
from helpers.training import TINY

from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.train.step import TrainStep
from resnet_in1k.utils.distributed import make_accelerator
from resnet_in1k.utils.launch import Launch

RECIPE = replace(
    TINY,
    global_batch_size=16,
    sync_batch_norm=True,
    stochastic_depth=0.3,
    mixup_alpha=0.4,
    cutmix_alpha=1.0,
    mix_by_pair=True,
    random_erasing_probability=0.3,
    max_grad_norm=1.0,
    label_smoothing=0.1,
)
NUM_CLASSES = 4


def train_ten_steps(accelerator: Accelerator, output: Path) -> None:
    """On generated images, in float64, in which rounding cannot grow to what the comparison allows; saves the model."""
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    torch.set_default_dtype(torch.float64)
    try:
        step, share = TrainStep(RECIPE, NUM_CLASSES, accelerator), 16 // num_processes
    finally:
        torch.set_default_dtype(torch.float32)
    augmentation = Augmentation(RECIPE, NUM_CLASSES, rank, num_processes, step.draw)
    losses = []
    for number in range(1, 11):
        generator = torch.Generator().manual_seed(number)
        images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
        rows, labels = slice(rank * share, (rank + 1) * share), torch.arange(16) % NUM_CLASSES
        images, targets, factors = augmentation(images[rows], labels[rows], number)
        loss = step(images.double(), targets.double(), 0.05, number, factors)
        losses.append(accelerator.reduce(loss, reduction="mean").item())
    if rank == 0:
        torch.save({"losses": losses, "model": step.model.state_dict()}, output)


@pytest.mark.slow
def test_two_processes_with_synchronized_norms_equal_one(tmp_path: Path):
    """Losses, weights and norm statistics of ten steps, to 1e-5."""
    command = [sys.executable, *TWO_PROCESSES, __file__, str(tmp_path / "two.pt")]
    environment = {**os.environ, "PYTHONPATH": "tests:.", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=200)
    train_ten_steps(Accelerator(cpu=True), tmp_path / "one.pt")
    two, one = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("two", "one"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert len(set(one["losses"])) == 10
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":  # in each of the two processes
    launch = Launch.connect()
    train_ten_steps(make_accelerator(launch, "fp32"), Path(sys.argv[1]))
    launch.gather(None, "training")
