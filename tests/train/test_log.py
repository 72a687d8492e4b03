import ast
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.checkpoint import TrainState
from resnet_in1k.train.log import print_end, write_steps
from resnet_in1k.train.trainer import TrainOptions
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.timing import Lap


def test_times_are_those_of_the_process_that_waited_longest(tiny: Recipe, tmp_path: Path, capsys):
    """Process 0 waits for the gradients of process 1, which waits for its data: the run is input-bound."""
    accelerator, launch = Accelerator(cpu=True), Launch()
    launch.gather = lambda mine, doing: [mine, [3.0, 1.0, 0.0]]
    folder = RunFolder(tmp_path)
    run = {"recipe": tiny, "options": TrainOptions(log_every=1), "counts": StepCounts(tiny, 2, 1, 37), "first_step": 1}
    run |= {"launch": launch, "accelerator": accelerator, "device": accelerator.device}
    run |= {"stopwatch": SimpleNamespace(lap=lambda: Lap(load=0.0, train=4.0)), "epoch_lap": Lap(), "num_workers": 2}
    write_steps(SimpleNamespace(folder=folder, state=TrainState(epoch_losses=[2.0]), **run), 1)
    (record,) = folder.records()
    assert (record["load_seconds"], record["train_seconds"]) == (3.0, 1.0)
    assert record["images_per_second"] == pytest.approx(8 / 4)
    assert "input-bound: needs about 6 more workers" in capsys.readouterr().out


def test_hints_are_for_a_shell_and_for_python(tmp_path: Path, tiny: Recipe, capsys):
    folder = RunFolder(tmp_path / 'my "run\'s" $HOME')
    counts = StepCounts(tiny, 1, 1, 37)
    print_end(SimpleNamespace(folder=folder, state=TrainState(best_step=1), counts=counts, start_seconds=0.0))
    *_, for_shell, for_python = capsys.readouterr().out.splitlines()
    assert shlex.split(for_shell)[-2:] == ["--ckpt", str(folder.path)]
    assert ast.literal_eval(for_python.partition("from_pretrained")[2]) == str(folder.path)
