"""scripts/export.py: equal logits, its own metadata, and errors in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from resnet_in1k.cli import export as export_module
from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.cli.export import ExportOptions, export
from resnet_in1k.hub.hub_folder import build_hub_folder
from resnet_in1k.model.exported import load_exported
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.weights import write_tensors
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import sha256_of


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_exported_network_is_evaluated_with_its_own_metadata(
    exported: RunFolder, image_folder: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture
):
    """Class names, preprocessing and origin are in the file; the counts equal those of the weights."""
    network = Path(shutil.copy(exported.path / f"model.{format}", tmp_path))
    expected = json.loads(exported.evaluation.read_text())
    facts = load_exported(network).facts
    assert facts["class_names"] == expected["class_names"]
    assert facts["exported_from"] == sha256_of(exported.weights)

    how = {"ckpt": str(network), "data": str(image_folder), "workers": 0}
    scored = evaluate(EvalOptions(**how, output=tmp_path / "scored.json", batch_size=5))
    result = json.loads((tmp_path / "scored.json").read_text())
    for name in ("top1_correct", "top5_correct", "class_top1_correct", "image_size", "resize_size", "top1_right"):
        assert result[name] == expected[name], name
    assert scored.loss == pytest.approx(expected["loss"], abs=1e-4)
    assert (result["file"], result["exported_from"]) == (network.name, expected["weights_sha256"])
    assert result["weights_sha256"] == sha256_of(network)
    assert "an exported network, computed on the CPU, 6 classes" in capsys.readouterr().out

    with pytest.raises(UserError, match="takes images of 32 px only; leave out --image-size"):
        evaluate(EvalOptions(**how, image_size=48))
    with pytest.raises(UserError, match=r"is an exported network, for evaluate\.py only"):
        load_model(network)


@pytest.mark.slow
def test_evaluated_exports_are_published(exported: RunFolder, tmp_path: Path):
    """Each format in the run folder with its evaluation adds a file and a row."""
    run = RunFolder(Path(shutil.copytree(exported.path, tmp_path / "run")))
    folder = build_hub_folder(run, "me/tiny")
    card = (folder / "README.md").read_text()
    for format in ("onnx", "pt2"):
        assert sha256_of(folder / f"model.{format}") == sha256_of(run.path / f"model.{format}")
        assert re.search(
            rf"^\| the same images, with `model.{format}` \| val \| 12 \| 36 px, bilinear \| 32 px \|", card, re.M
        )
    assert card.count("only one of the two classifies 0 images correctly.") == 2

    (run.path / "model.onnx").write_bytes(b"replaced")
    with pytest.raises(UserError, match=r"eval\.onnx\.json: weights_sha256 is .*; export and"):
        build_hub_folder(run, "me/tiny")
    (run.path / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"eval\.onnx\.json is of 'model\.onnx', which is not in"):
        build_hub_folder(run, "me/tiny")


def test_a_file_with_other_logits_is_not_kept(finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "model.safetensors"
    output.write_text("existing")

    def write_other_weights(state: dict[str, torch.Tensor], path: Path) -> None:
        write_tensors(state | {"fc.bias": state["fc.bias"] + 1e-3}, path)

    monkeypatch.setattr(export_module, "write_tensors", write_other_weights)
    with pytest.raises(UserError, match=r"the exported logits differ by .*, more than 0e\+00; .* was not written"):
        export(ExportOptions(ckpt=str(finished.path), format="safetensors", output=output))
    assert output.read_text() == "existing"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_old_weights_are_converted_evaluated_and_packaged(finished: RunFolder, image_folder: Path, tmp_path: Path):
    """Start from a checkpoint by torch.save, with `module.` before each key, as in README."""
    state = {f"module.{key}": value for key, value in load_file(finished.weights).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "old.pth")
    run = RunFolder(tmp_path / "runs/old")
    assert export(ExportOptions(ckpt=str(tmp_path / "old.pth"), format="safetensors", output=run.weights)) == 0
    assert sha256_of(run.weights) == sha256_of(finished.weights)
    torchvision.models.resnet18(num_classes=6).load_state_dict(load_file(run.weights), strict=True)
    evaluate(EvalOptions(ckpt=str(run.path), data=str(image_folder), image_size=32, output=run.evaluation, workers=0))
    card = (build_hub_folder(run, "me/old") / "README.md").read_text()
    assert "trained elsewhere and evaluated on" in card


def test_bad_options_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"must end in .onnx for --format onnx"):
        ExportOptions(ckpt="run", format="onnx", output=tmp_path / "model.pb")
    with pytest.raises(UserError, match="--image-size 0: must be at least 1"):
        ExportOptions(ckpt="run", format="onnx", output=tmp_path / "model.onnx", image_size=0)
