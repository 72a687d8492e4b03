import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from accelerate import Accelerator
from processes import assert_same_end
from safetensors.torch import load_file
from test_sources import tree_of_links

from resnet_in1k import randomness, run_writer, training
from resnet_in1k.augment import augment, draw
from resnet_in1k.checkpoint import TrainState, save_state_anew
from resnet_in1k.errors import UserError
from resnet_in1k.files import sha256_of
from resnet_in1k.optim import lr_at
from resnet_in1k.pipeline import epoch_order, train_loader
from resnet_in1k.randomness import Stream
from resnet_in1k.recipes import DEFAULT_DATA, RECIPES, Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.scoring import EvalOptions, evaluate_checkpoint
from resnet_in1k.sources import open_source
from resnet_in1k.training import TrainOptions, train

# TINY on digits in float32 at 64 px with a global batch of 128, on an AMD EPYC with torch 2.15, two threads. With one
# thread they differ by up to 2.4e-4.
GOLDEN_LOSSES = [2.34369, 2.37736, 2.34676, 2.39081, 2.36971, 2.34695]


def run(recipe: Recipe, data: object, output: Path, **options: object) -> RunFolder:
    how = {"workers": 0, "log_every": 1, "precision": "fp32", **options}
    return RunFolder(train("tiny", recipe, TrainOptions(data=str(data), output_dir=output, **how)))


def losses(folder: RunFolder) -> list[float]:
    return [record["loss"] for record in folder.records() if record["kind"] == "train"]


def test_golden_losses(tiny: Recipe, tmp_path: Path):
    """The same computation gives the same losses; other CPUs round otherwise, so not to the bit."""
    recipe = replace(tiny, epochs=1, global_batch_size=128, image_size=64, warmup_epochs=0)
    assert losses(run(recipe, "digits", tmp_path / "run"))[:6] == pytest.approx(GOLDEN_LOSSES, rel=2e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_losses_and_weights_of_a_plain_torch_loop(image_folder, tiny: Recipe, tmp_path: Path, accumulation: int):
    """torchvision's model, torch's SGD and cross entropy, written out; only the batches are ours."""
    folder = run(tiny, image_folder, tmp_path / "run", gradient_accumulation_steps=accumulation)

    source = open_source(str(image_folder), "train")
    randomness.key_global_generator(tiny.seed, Stream.WEIGHTS)
    model = torchvision.models.resnet18(num_classes=6, zero_init_residual=True)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    expected = []
    batches = train_loader(source, tiny, first_step=1, last_step=8, num_workers=0, pin_memory=False)
    for step, batch in enumerate(batches, start=1):
        sgd.param_groups[0]["lr"] = lr_at(step, tiny, 4)
        sgd.zero_grad()
        total = 0.0
        images = augment(batch.images, draw(tiny, step))
        for x, y in zip(images.chunk(accumulation), batch.labels.chunk(accumulation), strict=True):
            loss = torch.nn.functional.cross_entropy(model(x), y, label_smoothing=0.1) / accumulation
            loss.backward()
            total += loss.item()
        sgd.step()
        expected.append(total)

    assert losses(folder) == pytest.approx(expected, rel=1e-3)
    weights = load_file(folder.checkpoints / "step_00000008/model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=2e-3, rtol=1e-2)


def test_the_run_folder_holds_what_the_design_says(finished: RunFolder):
    names = {path.name for path in finished.path.iterdir()}
    assert names == {
        "recipe.json", "log.jsonl", "curves.svg", "curves.png", "checkpoints", "model.safetensors", "eval.json",
        ".lock",
    }  # fmt: skip
    assert sorted(path.name for path in finished.checkpoints.iterdir()) == [
        "step_00000003", "step_00000004", "step_00000006", "step_00000008",
    ]  # fmt: skip
    kinds = [(record["kind"], record["epoch"], record["step"]) for record in finished.records()]
    assert kinds == [
        *(("train", 1, step) for step in (1, 2, 3, 4)),
        ("epoch", 1, 4),
        *(("train", 2, step) for step in (5, 6, 7, 8)),
        ("epoch", 2, 8),
    ]
    train_keys = {"kind", "epoch", "step", "loss", "lr", "images_per_second", "load_seconds", "train_seconds"}
    epoch_keys = {"train_loss", "val_loss", "top1_accuracy", "top5_accuracy", "val_seconds"}
    epoch_keys |= {"kind", "epoch", "step", "lr", "load_seconds", "train_seconds"}
    assert [set(record) for record in finished.records()[3:5]] == [train_keys, epoch_keys]


def test_an_epochs_loss_is_its_own_mean(finished: RunFolder):
    records = finished.records()
    for epoch in (1, 2):
        steps = [r["loss"] for r in records if r["kind"] == "train" and r["epoch"] == epoch]
        (summary,) = [r for r in records if r["kind"] == "epoch" and r["epoch"] == epoch]
        assert summary["train_loss"] == pytest.approx(np.mean(steps), rel=1e-12)


def test_log_lines_cover_every_step_once(tiny: Recipe, image_folder: Path, finished: RunFolder, tmp_path: Path):
    """Lines every 3 of 4 steps: the means over 3 and 1 are those of the run that logged each step."""
    every = losses(finished)
    coarse = losses(run(tiny, image_folder, tmp_path / "run", log_every=3))
    expected = [np.mean(every[0:3]), every[3], np.mean(every[4:7]), every[7]]
    assert coarse == pytest.approx(expected, rel=1e-6)


def test_eval_json_is_of_exactly_the_best_weights(finished: RunFolder):
    result = json.loads(finished.evaluation.read_text())
    assert result["weights_sha256"] == sha256_of(finished.weights)
    epochs = [record for record in finished.records() if record["kind"] == "epoch"]
    best = max(epochs, key=lambda record: record["top1_accuracy"])
    assert result["top1_accuracy"] == best["top1_accuracy"]
    assert (result["num_images"], result["split"], result["num_classes"]) == (12, "val", 6)
    step = finished.checkpoints / f"step_{best['step']:08d}"
    assert sha256_of(step / "model.safetensors") == result["weights_sha256"]


def test_evaluating_again_gives_what_was_logged(finished: RunFolder):
    (last,) = [record for record in finished.records() if record["kind"] == "epoch" and record["epoch"] == 2]
    step = finished.checkpoints / "step_00000008"
    for checkpoint in (step, step / "model.safetensors"):
        evaluation = evaluate_checkpoint(EvalOptions(ckpt=checkpoint, batch_size=5, workers=1))
        assert evaluation.top1_accuracy == last["top1_accuracy"]
        assert evaluation.top5_accuracy == last["top5_accuracy"]
        assert evaluation.loss == pytest.approx(last["val_loss"], abs=1e-5)


@pytest.mark.parametrize("last_kept", [3, 4, 6])
def test_a_resumed_run_ends_as_if_never_interrupted(tiny, image_folder, finished, tmp_path: Path, last_kept: int):
    """From within an epoch and from its end, with another number of workers: weights, momentum, losses, best."""
    copy = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    for path in copy.checkpoints.iterdir():
        if int(path.name.removeprefix("step_")) > last_kept:
            shutil.rmtree(path)
    run(tiny, image_folder, copy.path, resume=True, checkpoint_every=3, keep_checkpoints=9, workers=2)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        ours, theirs = (folder.checkpoints / "step_00000008" / name for folder in (copy, finished))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert copy.weights.read_bytes() == finished.weights.read_bytes()
    timing = {"images_per_second", "load_seconds", "train_seconds", "val_seconds"}
    for ours, theirs in zip(copy.records(), finished.records(), strict=True):
        assert {k: v for k, v in ours.items() if k not in timing} == {
            k: v for k, v in theirs.items() if k not in timing
        }


def test_a_run_under_a_gradient_scaler_is_resumed_alike(tiny, image_folder, tmp_path: Path, monkeypatch):
    """As with fp16 on a GPU: its first step is skipped, its scale shrinks and grows, and is part of the state."""
    whole_accelerator, whole_step = training.make_accelerator, training.TrainStep.__call__
    loss_function = torch.nn.CrossEntropyLoss()

    def scaled(*arguments: object) -> Accelerator:
        accelerator = whole_accelerator(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-20, growth_interval=2)
        return accelerator

    def too_steep_at_first(self, images: torch.Tensor, labels: torch.Tensor, lr: float) -> torch.Tensor:
        steepness = 1e30 if lr == lr_at(1, tiny, 4) else 1.0
        self._loss_function = lambda logits, labels: loss_function(logits * steepness, labels)
        return whole_step(self, images, labels, lr)

    monkeypatch.setattr(training, "make_accelerator", scaled)
    monkeypatch.setattr(training.TrainStep, "__call__", too_steep_at_first)
    how = {"checkpoint_every": 1, "keep_checkpoints": 9}
    folder = run(tiny, image_folder, tmp_path / "run", **how)
    scales = [
        json.loads((folder.checkpoints / f"step_{step:08d}/state.json").read_text())["grad_scaler"]["scale"]
        for step in range(1, 9)
    ]
    assert scales == [2.0**20, 2.0**20, 2.0**21, 2.0**21, 2.0**22, 2.0**22, 2.0**23, 2.0**23]
    assert load_file(folder.checkpoints / "step_00000001/optimizer.safetensors") == {}
    for last_kept in (1, 5):
        copy = RunFolder(Path(shutil.copytree(folder.path, tmp_path / f"from {last_kept}")))
        for path in copy.checkpoints.iterdir():
            if int(path.name.removeprefix("step_")) > last_kept:
                shutil.rmtree(path)
        run(tiny, image_folder, copy.path, resume=True, **how)
        assert_same_end(copy, folder)


def test_without_momentum_there_is_nothing_to_save_of_it(tiny, image_folder, tmp_path: Path):
    folder = run(replace(tiny, momentum=0.0), image_folder, tmp_path / "run", checkpoint_every=3, keep_checkpoints=9)
    copy = RunFolder(Path(shutil.copytree(folder.path, tmp_path / "copy")))
    for step in (4, 6, 8):
        shutil.rmtree(copy.checkpoints / f"step_{step:08d}")
    run(replace(tiny, momentum=0.0), image_folder, copy.path, resume=True, checkpoint_every=3, keep_checkpoints=9)
    assert_same_end(copy, folder)


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tiny, image_folder, finished: RunFolder, tmp_path: Path):
    """Resumed at 4, as 6 is damaged and 8 was never reached: two whole ones are kept, and the damaged one stays."""
    copy = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    shutil.rmtree(copy.checkpoints / "step_00000008")
    shutil.rmtree(copy.checkpoints / "step_00000003")
    values = json.loads((copy.checkpoints / "step_00000004/state.json").read_text())
    del values["format_version"], values["sha256"]
    worse = {**values, "best_top1_accuracy": 0.0}  # so that 8 will be the best, and 4 is kept for being whole only
    save_state_anew(copy.checkpoints, TrainState(**worse))
    with (copy.checkpoints / "step_00000006/model.safetensors").open("r+b") as file:
        file.truncate(1000)
    run(tiny, image_folder, copy.path, resume=True, keep_checkpoints=2)
    assert [path.name for path in sorted(copy.checkpoints.iterdir())] == [f"step_{n:08d}" for n in (4, 6, 8)]


def test_an_epochs_verdict_is_written_once_and_published_as_the_checkpoint_has_it(
    tiny, image_folder, finished: RunFolder, tmp_path: Path, monkeypatch
):
    """Killed after the second epoch's record and publication, but before its checkpoint knew of them."""
    folder = RunFolder(tmp_path / "run")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    whole = run_writer.save_state_anew
    with monkeypatch.context() as patch:
        patch.setattr(run_writer, "save_state_anew", lambda *known: (killed if known[1].step == 8 else whole)(*known))
        patch.setattr(run_writer.Evaluation, "top1_accuracy", property(lambda self: len(folder.records()) / 100))
        with pytest.raises(KeyboardInterrupt):
            run(tiny, image_folder, folder.path, checkpoint_every=3, keep_checkpoints=9)
    assert folder.records()[-1]["kind"] == "epoch"
    first = json.loads((folder.checkpoints / "step_00000008/state.json").read_text())
    assert first["best_step"] == 4
    assert len(first["epoch_losses"]) == 4
    assert sha256_of(folder.weights) != first["best_evaluation"]["weights_sha256"]

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, image_folder, folder.path, resume=True)
    assert folder.records()[-1]["kind"] == "train"
    assert sha256_of(folder.weights) == sha256_of(folder.checkpoints / "step_00000004/model.safetensors")
    assert json.loads(folder.evaluation.read_text()) == first["best_evaluation"]

    run(tiny, image_folder, folder.path, resume=True, checkpoint_every=3, keep_checkpoints=9)
    assert [record["step"] for record in folder.records() if record["kind"] == "epoch"] == [4, 8]


def test_a_finished_run_resumed_is_left_as_it_is(tiny: Recipe, image_folder: Path, finished: RunFolder, tmp_path: Path):
    copy = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    run(tiny, image_folder, copy.path, resume=True)
    assert copy.log.read_bytes() == finished.log.read_bytes()
    assert copy.weights.read_bytes() == finished.weights.read_bytes()


def test_resuming_otherwise_is_refused_with_the_differences(tiny, finished: RunFolder, image_folder, tmp_path: Path):
    with pytest.raises(UserError, match=r"was begun otherwise: lr 0.002 → 0.5; data .* → digits \(other files\)"):
        run(replace(tiny, lr=0.5), "digits", finished.path, resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        run(tiny, image_folder, finished.path)


def test_another_precision_is_refused(tiny, finished: RunFolder, image_folder: Path):
    with pytest.raises(UserError, match=r"was begun otherwise: precision float32 → bfloat16 autocast"):
        run(tiny, image_folder, finished.path, resume=True, precision="bf16")


def test_more_epochs_go_on_where_the_schedule_does_not_depend_on_them(tiny, image_folder: Path, tmp_path: Path, capsys):
    """One epoch, resumed for two, is two epochs; recipe.json tells of it, and of the other accumulation."""
    recipe = replace(tiny, lr_schedule="step", lr_step_epochs=1)
    whole = run(recipe, image_folder, tmp_path / "whole")
    folder = run(replace(recipe, epochs=1), image_folder, tmp_path / "run")
    run(recipe, image_folder, folder.path, resume=True)
    assert_same_end(folder, whole)
    facts = json.loads(folder.recipe.read_text())
    assert facts["recipe"]["epochs"] == 2
    assert facts["resumed"][0]["after_step"] == 4

    capsys.readouterr()
    run(replace(recipe, epochs=3), image_folder, folder.path, resume=True, gradient_accumulation_steps=2)
    assert "bits will differ" in capsys.readouterr().out
    assert [entry["gradient_accumulation_steps"] for entry in json.loads(folder.recipe.read_text())["resumed"]] == [
        1,
        2,
    ]


def test_bad_images_are_replaced_counted_and_listed(tiny: Recipe, image_folder: Path, tmp_path: Path, capsys):
    """Two of 2,000, alike in a run that was interrupted."""
    data = tree_of_links(tmp_path / "images", image_folder / "train/ant/0.jpg", num_classes=5, images_per_class=400)
    recipe = replace(tiny, global_batch_size=40, epochs=1, image_size=16)
    order = epoch_order(2000, recipe.seed, 1).tolist()
    source = open_source(str(data), "train")
    bad = sorted(source.image_name(index) for index in (order[60], order[1999]))
    for name in bad:
        Path(name).unlink()
        Path(name).write_text("not an image")
    how = {"on_bad_image": "skip", "log_every": 10, "checkpoint_every": 25, "keep_checkpoints": 9}
    folder = run(recipe, data, tmp_path / "run", **how)
    said = capsys.readouterr().out
    assert folder.bad_images.read_text().splitlines() == bad
    assert said.count("replaced by the next: ") == 2
    state = json.loads((folder.checkpoints / "step_00000025/state.json").read_text())
    assert state["bad_images"] == [order[60]]

    copy = RunFolder(Path(shutil.copytree(folder.path, tmp_path / "copy")))
    shutil.rmtree(copy.checkpoints / "step_00000050")
    copy.bad_images.write_text("")
    run(recipe, data, copy.path, resume=True, **how)
    assert copy.bad_images.read_text().splitlines() == bad
    assert_same_end(copy, folder)


def test_too_many_bad_images_stop_the_run_all_the_same(tiny: Recipe, image_folder: Path, tmp_path: Path):
    data = tree_of_links(tmp_path / "images", image_folder / "train/ant/0.jpg", num_classes=5, images_per_class=400)
    for label in range(5):
        broken = data / f"train/n{label:08d}/n{label:08d}_200.JPEG"
        broken.unlink()
        broken.write_text("not an image")
    recipe = replace(tiny, global_batch_size=400, epochs=1, image_size=16)
    words = r"[345] of 2,000 training images cannot be read .*more than the 0\.1 % .*they are listed in .*/bad_im"
    with pytest.raises(UserError, match=words):
        run(recipe, data, tmp_path / "run", on_bad_image="skip")
    assert len((tmp_path / "run/bad_images.txt").read_text().splitlines()) >= 3


def test_resume_without_a_run_starts_one(tiny: Recipe, image_folder: Path, tmp_path: Path):
    folder = run(replace(tiny, epochs=1), image_folder, tmp_path / "new", resume=True)
    assert len(losses(folder)) == 4


def test_dry_run_plans_and_writes_nothing(tiny: Recipe, image_folder: Path, tmp_path: Path, capsys):
    run(tiny, image_folder, tmp_path / "run", dry_run=True)
    assert "4 an epoch" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_trains_a_step(name: str, image_folder: Path, tmp_path: Path):
    """As it is, but for the size of model, batch and image."""
    small = replace(RECIPES[name], model="resnet18", global_batch_size=30, image_size=32, epochs=1, warmup_epochs=0)
    assert RECIPES[name].epochs > 1
    assert DEFAULT_DATA[name]
    folder = run(small, image_folder, tmp_path / "run")
    assert np.isfinite(losses(folder)).all()
    assert len(losses(folder)) == 1


def test_bf16_trains_close_to_float32(tiny: Recipe, image_folder: Path, finished: RunFolder, tmp_path: Path):
    half = losses(run(tiny, image_folder, tmp_path / "run", precision="bf16"))
    assert half != losses(finished)
    assert half[:3] == pytest.approx(losses(finished)[:3], rel=0.03)


def test_what_is_said_on_the_way(tiny: Recipe, image_folder: Path, tmp_path: Path, capsys):
    run(replace(tiny, epochs=1), image_folder, tmp_path / "run", log_every=2)
    out = capsys.readouterr().out
    for part in ("epoch 1/1  step 2/4  loss ", "images/s  a batch: load ", "epoch 1/1 done  train loss ", "top-1 "):
        assert part in out
    for part in ("12 of 12 images", "waited for data", "scripts/evaluate.py --ckpt", "ResNet.from_pretrained"):
        assert part in out


def test_compiling_leaves_losses_and_keys_as_they_are(tiny, image_folder, finished, tmp_path: Path, monkeypatch):
    """With dynamo's own graph but without a C++ compiler, which not every machine has."""
    compiled = []
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self) or plain(self, backend="eager"))
    folder = run(tiny, image_folder, tmp_path / "run", compile=True)
    assert len(compiled) == 1
    assert losses(folder)[:4] == pytest.approx(losses(finished)[:4], rel=1e-4)
    assert load_file(folder.weights).keys() == load_file(finished.weights).keys()


@pytest.mark.parametrize(("worth_saying", "said"), [(-1.0, True), (2.0, False)])
def test_waiting_for_data_is_diagnosed(tiny, image_folder, tmp_path: Path, monkeypatch, capsys, worth_saying, said):
    monkeypatch.setattr("resnet_in1k.training.WAITING_SHARE_WORTH_SAYING", worth_saying)
    run(replace(tiny, epochs=1), image_folder, tmp_path / "run")
    assert bool(re.search(r"(ms|of the training time): (compute|input)-bound", capsys.readouterr().out)) is said


def test_reports_to_a_tracker_too(tiny: Recipe, image_folder: Path, tmp_path: Path):
    """Read back by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(replace(tiny, epochs=1), image_folder, tmp_path / "run", report_to="tensorboard")
    (events,) = [path for path in folder.path.rglob("events.out.tfevents.*") if path.parent.name == "run"]
    reader = EventAccumulator(str(events)).Reload()
    assert [event.step for event in reader.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in reader.Scalars("loss")] == pytest.approx(losses(folder), rel=1e-6)
    assert len(reader.Scalars("top1_accuracy")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"log_every": 0}, "--log-every 0"), ({"checkpoint_every": -1}, "-1"), ({"keep_checkpoints": 0}, "at least 1")],
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        TrainOptions(**options)
