from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.checkpoint import TrainState
from resnet_in1k.train.log import TrainLog
from resnet_in1k.train.writer import RunWriter
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.timing import Lap


def test_times_are_those_of_the_process_that_waited_longest(tiny: Recipe, tmp_path: Path, capsys):
    """Process 0 waits for the gradients of process 1, which waits for its data: the run is input-bound."""
    accelerator = Accelerator(cpu=True)
    accelerator.gather = lambda mine: torch.cat([mine, torch.tensor([[3.0, 1.0, 0.0]])])
    folder = RunFolder(tmp_path)
    log = TrainLog(
        StepCounts(tiny, 2, 1, 37),
        folder,
        RunWriter(folder, Launch(), keep_checkpoints=1),
        accelerator,
        log_every=1,
        num_workers=2,
    )
    log.stopwatch.lap = lambda: Lap(load=0.0, train=4.0)
    state = TrainState()
    log.add(torch.tensor(2.0))
    state.epoch_losses += log.collect_losses()
    log.write_steps(state, 1)
    (record,) = folder.records()
    assert (record["load_seconds"], record["train_seconds"]) == (3.0, 1.0)
    assert record["images_per_second"] == pytest.approx(8 / 4)
    assert "input-bound: needs about 6 more workers" in capsys.readouterr().out
