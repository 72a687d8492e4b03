"""Processes that are not alike are refused before the first step, with the machine's name."""

import dataclasses
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.threads import run_launch, this_rank

from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, provenance
from resnet_in1k.train import preflight
from resnet_in1k.train.trainer import TrainOptions
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import lock_folder
from resnet_in1k.utils.launch import Launch


def outcomes(check, num_processes: int = 3) -> list[str]:
    """What each process of a launch says, on machines node0, node1 …; "" for nothing."""

    def body(launch: Launch) -> None:
        launch.machine = f"node{launch.rank}"
        check(launch)

    results = run_launch(*[body] * num_processes)
    assert all(result is None or type(result) is UserError for result in results), results
    return [str(result or "") for result in results]


def test_equal_processes_agree(tiny: Recipe, tmp_path: Path):
    run = RunFolder(tmp_path)

    def check(launch: Launch) -> None:  # what belongs to one machine may differ
        preflight.check_same_program(launch, tiny, TrainOptions(workers=launch.rank, cpu_threads=1 + launch.rank), run)

    assert outcomes(check) == ["", "", ""]


@pytest.mark.parametrize(
    ("made_by", "recipe", "options", "message"),
    [
        ({"commit": "abc"}, {}, {}, "commit: abc there"),
        ({"versions": {**provenance()["versions"], "torch": "1.0"}}, {}, {}, "torch: 1.0 there"),
        ({}, {"lr": 1.1}, {}, "lr: 1.1 there, 0.002 here"),
        ({}, {}, {"checkpoint_every": 1}, "checkpoint_every: 1 there, 0 here"),
    ],
    ids=["commit", "version", "recipe", "option"],
)
def test_another_program_or_command_is_refused(
    tiny: Recipe, tmp_path: Path, monkeypatch, made_by: dict, recipe: dict, options: dict, message: str
):
    monkeypatch.setattr(preflight, "provenance", lambda: {**provenance(), **(made_by if this_rank() == 2 else {})})

    def check(launch: Launch) -> None:
        is_other = launch.rank == 2
        ours = dataclasses.replace(tiny, **(recipe if is_other else {}))
        how = TrainOptions(**(options if is_other else {}))
        preflight.check_same_program(launch, ours, how, RunFolder(tmp_path))

    said = outcomes(check)
    assert len(set(said)) == 1
    assert said[0].startswith(f"node2 differs from node0: {message}")


def test_run_that_only_some_machines_see_is_refused(tiny: Recipe, tmp_path: Path):
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0/recipe.json").write_text("{}")

    def check(launch: Launch) -> None:
        folder = RunFolder(tmp_path / launch.machine)
        folder.recipe = folder.path / "recipe.json"
        preflight.check_same_program(launch, tiny, TrainOptions(), folder)

    said = outcomes(check, 2)
    assert "node1 differs from node0" in said[0]


def test_clock_off_by_an_hour_is_refused(tiny: Recipe, tmp_path: Path, monkeypatch):
    whole = time.time
    clock = SimpleNamespace(time=lambda: whole() + 3605 * (this_rank() == 1), monotonic=time.monotonic)
    monkeypatch.setattr(preflight, "time", clock)
    said = outcomes(lambda launch: preflight.check_same_program(launch, tiny, TrainOptions(), RunFolder(tmp_path)))
    assert len(set(said)) == 1
    assert said[0].startswith("node1 differs from node0: clock: 1 h 0 min off there, right here; ")


@pytest.mark.parametrize(
    ("change", "words"),
    [(Path.unlink, "cannot be read: No such file"), (lambda path: path.write_bytes(b"x"), "2d711642b726")],
    ids=["missing", "changed"],
)
def test_other_data_are_refused(image_folder: Path, tmp_path: Path, monkeypatch, change, words: str):
    """A copy elsewhere is not other data, unless an image changes."""
    monkeypatch.setattr(
        "resnet_in1k.data.image_folder.FileSource.image_name", lambda source, index: f"{source.split}{index}"
    )
    other_folder = Path(shutil.copytree(image_folder, tmp_path / "other"))
    sources = open_train_and_val(str(image_folder))
    others = tuple(dataclasses.replace(source, folder=other_folder / source.split) for source in sources)

    def check(launch: Launch) -> None:
        preflight.check_same_data(launch, others if launch.rank == 1 else sources)

    assert outcomes(check) == ["", "", ""]
    change(other_folder / "train/ant/0.jpg")
    said = outcomes(check)
    assert len(set(said)) == 1
    assert said[0].startswith("node1 differs from node0: train0: ")
    assert words in said[0]


def test_run_folder_must_be_shared(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(preflight, "VISIBLE_WITHIN_SECONDS", 0.1)
    shared, own = RunFolder(tmp_path / "shared"), RunFolder(tmp_path / "own")
    for folder in (shared, own):
        folder.path.mkdir()
    own.lock.write_text("process 1 on node1")  # of an earlier run
    lock = lock_folder(shared.path)
    assert outcomes(lambda launch: preflight.check_run_folder_is_shared(launch, shared)) == ["", "", ""]
    said = outcomes(lambda launch: preflight.check_run_folder_is_shared(launch, own if launch.rank else shared))
    for text in said:  # each with the path as it knows it
        assert text.startswith(f"node1 differs from node0: {own.lock}: ")
        assert "put the run folder on storage that all machines share" in text
    del lock


def test_machine_with_too_little_memory_is_named(image_folder: Path, monkeypatch):
    """Its container has a limit that the others' have not."""
    monkeypatch.setattr(preflight, "available_memory", lambda: 10**6 if this_rank() == 1 else 10**12)
    train, val = open_train_and_val(str(image_folder))

    loader = SimpleNamespace(slots=SimpleNamespace(nbytes=10**6))
    whole = {"train_source": train, "val_source": val, "train_loader": loader, "eval_loader": loader}
    whole |= {"options": TrainOptions(), "num_workers": 8}
    said = outcomes(lambda launch: preflight.check_machines(SimpleNamespace(launch=launch, **whole)))
    assert len(set(said)) == 1
    assert said[0].startswith("node1: too little memory for 8 loader workers: ")
    assert "1 MB of memory" in said[0]
