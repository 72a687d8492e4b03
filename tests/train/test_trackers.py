"""A run that is resumed after step 4 of 6 goes on in its tracker's run, and no value is lost; TensorBoard's is tested
with a whole run, in test_loop.py."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType

from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.log import start_tracker, track
from resnet_in1k.utils.errors import UserError

CONFIG = {"model": "resnet18", "lr": 0.1}


def start(name: str, folder: Path, first_step: int = 1) -> SimpleNamespace:
    """As training does: in a process of its own, so with an accelerator of its own. As much of a run as that needs."""
    folder.mkdir(exist_ok=True, parents=True)
    run = {"folder": RunFolder(folder), "options": SimpleNamespace(report_to=name), "first_step": first_step}
    run |= {"accelerator": Accelerator(cpu=True, log_with=name, project_dir=folder)}
    run = SimpleNamespace(recipe=SimpleNamespace(**CONFIG), **run)
    start_tracker(run)
    return run


def train_until_killed_and_resume(name: str, run: Path) -> None:
    """Steps 1 to 6 with losses 101 to 106; then, in a folder that was renamed, 5 to 8 with losses 205 to 208."""
    for first_step, last_step, loss in [(1, 6, 100), (5, 8, 200)]:
        started = start(name, run, first_step)
        for step in range(first_step, last_step + 1):
            track(started, {"kind": "train", "epoch": 1, "step": step, "loss": float(loss + step)})
        track(started, {"kind": "epoch", "epoch": 1, "step": last_step, "top1_accuracy": loss / 1000})
        if last_step == 8:
            started.accelerator.end_training()


RESUMED = {1: 101.0, 2: 102.0, 3: 103.0, 4: 104.0, 5: 205.0, 6: 206.0, 7: 207.0, 8: 208.0}


def known_run(run: Path, name: str) -> dict[str, str]:
    return json.loads((run / "tracker.json").read_text())[name]


def test_a_renamed_run_goes_on_where_it_was_and_other_trackers_are_kept(tmp_path: Path):
    start("tensorboard", tmp_path / "old").accelerator.end_training()
    (tmp_path / "old").rename(tmp_path / "new")
    file = tmp_path / "new/tracker.json"
    known = {**json.loads(file.read_text()), "wandb": {"project": "mine", "id": "1"}}
    file.write_text(json.dumps(known))
    start("tensorboard", tmp_path / "new").accelerator.end_training()
    assert len(list((tmp_path / "new/old").glob("events.*"))) == 2
    assert not (tmp_path / "new/new").exists()
    assert json.loads(file.read_text()) == known


def test_trackio_has_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In its own database; what was taken back stays beside what replaced it."""
    storage = pytest.importorskip("trackio.sqlite_storage")
    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    train_until_killed_and_resume("trackio", tmp_path / "mine")
    (record,) = storage.SQLiteStorage.get_run_records("mine")
    assert record["name"] == known_run(tmp_path / "mine", "trackio")["id"]
    rows = storage.SQLiteStorage.get_logs("mine", record["name"])
    logged = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert dict(logged) == RESUMED
    assert len(logged) == 6 + 4


class FakeWandb(ModuleType):
    """As much of wandb as Accelerate calls: it drops the values of a step that goes back, as the real one does."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, SimpleNamespace] = {}
        self.config = SimpleNamespace(update=self._update_config)

    def init(self, project: str, id: str, resume: str) -> SimpleNamespace:
        assert resume == "allow"
        run = self.runs.setdefault(id, SimpleNamespace(project=project, config={}, rows=[], step=0, x_axes={}))

        def log(values: dict[str, Any], step: int | None = None) -> None:
            if step is None or step >= run.step:
                run.rows.append(values)
                run.step = (run.step if step is None else step) + 1

        run.log, run.finish = log, lambda: None
        run.define_metric = lambda name, step_metric: run.x_axes.update({name: step_metric})
        self._current = run
        return run

    def _update_config(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self._current.config.update(values)


def test_wandb_gets_all_values_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Though the steps go back; the step is a value, and the x axis of the others."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    train_until_killed_and_resume("wandb", tmp_path / "mine")
    ((run_id, run),) = wandb.runs.items()
    assert {"project": run.project, "id": run_id} == known_run(tmp_path / "mine", "wandb")
    assert (run.project, run.config, run.x_axes) == ("mine", CONFIG, {"*": "step"})
    logged = [(row["step"], row["loss"]) for row in run.rows if "loss" in row]
    assert dict(logged) == RESUMED
    assert len(logged) == 6 + 4
    assert [row["top1_accuracy"] for row in run.rows if "top1_accuracy" in row] == [0.1, 0.2]


@pytest.mark.parametrize("text", ["{", "[]", '{"tensorboard": 3}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str):
    (tmp_path / "tracker.json").write_text(text)
    words = r"tracker.json cannot be read \(.*\); restore, correct or remove it$"
    with pytest.raises(UserError, match=words) as error:
        start("tensorboard", tmp_path)
    assert "\n" not in str(error.value)
