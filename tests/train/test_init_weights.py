"""Training from given weights: what is kept of them, what is recorded, and resuming without them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.processes import assert_same_end
from helpers.training import rewind, run
from safetensors.torch import load_file

from resnet_in1k.model.resnet import ResNet
from resnet_in1k.model.weights import weights_to_save, write_tensors
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.train.init_weights import initial_weights
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import sha256_of
from resnet_in1k.utils.launch import Launch

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def before(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A finished run of the six classes, to copy, change and remove."""
    return RunFolder(Path(shutil.copytree(finished.path, tmp_path / "before")))


@pytest.fixture
def finetune(tiny: Recipe) -> Recipe:
    return replace(tiny, freeze_epochs=1, head_lr_factor=10, lr=1e-3)


def test_the_head_is_trained_alone_then_all(before: RunFolder, finetune: Recipe, image_folder: Path, tmp_path, capsys):
    folder = run(finetune, image_folder, tmp_path / "run", init_from=str(before.path), keep_checkpoints=9)
    assert f"  starts from   {before.path}, with its head\n" in capsys.readouterr().out
    facts = json.loads(folder.recipe.read_text())["init_from"]
    expected = {"checkpoint": str(before.path), "origin": "", "sha256": sha256_of(before.weights)}
    assert facts == {**expected, "architecture": "resnet18", "head": "with its head"}
    initial = load_file(before.weights)
    for epoch, is_frozen in ((1, True), (2, False)):
        weights = load_file(folder.checkpoints / f"step_{4 * epoch:08d}/model.safetensors")
        assert not torch.equal(weights["fc.weight"], initial["fc.weight"])
        for name in ("conv1.weight", "bn1.weight", "bn1.running_mean", "bn1.num_batches_tracked", "layer4.0.bn2.bias"):
            assert torch.equal(weights[name], initial[name]) == is_frozen, name


@pytest.mark.slow
def test_a_resumed_run_does_not_need_them(before: RunFolder, finetune: Recipe, image_folder: Path, tmp_path: Path):
    """Resumed in the frozen epoch without the initial weights, it has the bytes of the uninterrupted run."""
    how = {"init_from": str(before.path), "checkpoint_every": 2, "keep_checkpoints": 9}
    whole = run(finetune, image_folder, tmp_path / "whole", **how)
    part = rewind(whole, 2, tmp_path / "part")
    shutil.rmtree(before.path)
    run(finetune, image_folder, part.path, resume=True, **how)
    assert_same_end(part, whole)


def test_checkpoints_belong_to_the_weights_that_their_run_started_from(
    before: RunFolder, tiny: Recipe, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """As the checkpoints of another run, copied here, do not."""
    how = {"init_from": str(before.path)}
    folder = run(replace(tiny, epochs=1), image_folder, tmp_path / "run", **how)
    facts = json.loads(folder.recipe.read_text())
    facts["init_from"]["sha256"] = "0" * 64
    folder.recipe.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="none of the 1 checkpoints in"):
        run(replace(tiny, epochs=1), image_folder, folder.path, resume=True, **how)
    assert "skipped: " in capsys.readouterr().out


def test_the_head_is_kept_by_class_names(before: RunFolder, tiny: Recipe, tmp_path: Path):
    """In another order its rows are; of a part of the classes their rows are; of others it is new."""
    initial = load_file(before.weights)

    def head_for(*class_names: str) -> tuple[str, torch.Tensor | None]:
        facts, tensors = initial_weights(str(before.path), None, tiny, class_names, RunFolder(tmp_path), {}, Launch())
        assert torch.equal(tensors["conv1.weight"], initial["conv1.weight"])
        return facts["head"], tensors.get("fc.weight")

    words, rows = head_for("fox", "ant", "bee", "cat", "dog", "eel")
    assert words == "with its head"
    assert torch.equal(rows, initial["fc.weight"][[5, 0, 1, 2, 3, 4]])
    words, rows = head_for("bee", "fox")
    assert words == "with 2 of its head's 6 classes"
    assert torch.equal(rows, initial["fc.weight"][[1, 5]])
    assert head_for("bee", "yak") == ("with a new head of 2 classes, because the class names differ", None)
    (before.path / "recipe.json").unlink()
    (before.path / "eval.json").unlink()
    assert head_for("bee", "fox") == ("with a new head of 2 classes, because its classes have no names", None)


def test_averages_and_backbones_of_other_scripts(before: RunFolder, tiny: Recipe, tmp_path: Path):
    """The flag belongs to the weights: a run is not resumed with another one."""
    weights = load_file(before.weights)
    averages = {key: tensor + 1 for key, tensor in weights.items()}
    body = {key: tensor for key, tensor in weights.items() if not key.startswith("fc.")}
    torch.save({"state_dict": body, "state_dict_ema": averages}, tmp_path / "both.pth")
    arguments = (tiny, ("ant", "bee"), RunFolder(tmp_path / "run"))
    facts, tensors = initial_weights(str(tmp_path / "both.pth"), None, *arguments, {}, Launch())
    assert facts["head"] == "with a new head of 2 classes, because it has no last layer of classes"
    assert tensors.keys() == body.keys()
    assert torch.equal(tensors["conv1.weight"], weights["conv1.weight"])
    facts, tensors = initial_weights(str(tmp_path / "both.pth"), "ema", *arguments, {}, Launch())
    assert facts["weights"] == "ema"
    assert torch.equal(tensors["conv1.weight"], averages["conv1.weight"])
    with pytest.raises(UserError, match=r"was started from .*pth --weights ema, not from .*both\.pth; resume"):
        initial_weights(str(tmp_path / "both.pth"), None, *arguments, {"init_from": facts}, Launch())
    assert initial_weights(str(tmp_path / "both.pth"), "ema", *arguments, {"init_from": facts}, Launch())[0] == facts


def test_weights_that_do_not_fit_are_refused(
    before: RunFolder, tiny: Recipe, image_folder: Path, photographs, tmp_path: Path
):
    def start(recipe: Recipe = tiny, checkpoint: str | None = str(before.path), **how: object) -> RunFolder:
        return run(recipe, image_folder, tmp_path / "run", init_from=checkpoint, **how)

    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        start(checkpoint="nowhere")
    assert not (tmp_path / "run/recipe.json").exists()
    start(replace(tiny, epochs=1))
    with pytest.raises(UserError, match=r"was started from .*before, not from random weights; resume with the same"):
        start(replace(tiny, epochs=1), None, resume=True)
    shutil.rmtree(tmp_path / "run/checkpoints")
    write_tensors(weights_to_save(ResNet("resnet18", 6)), before.weights)
    with pytest.raises(UserError, match=r"before has changed since .*run was started"):
        start(replace(tiny, epochs=1), resume=True)
