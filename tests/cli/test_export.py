"""scripts/export.py: equal logits, its own metadata, and errors in one line."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file

from resnet_in1k.cli import export as export_module
from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.cli.export import ExportOptions, export
from resnet_in1k.hub.hub_folder import build_hub_folder
from resnet_in1k.model.exported import read_facts
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.weights import write_tensors
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import sha256_of


def options(run: RunFolder, format: str, output: Path) -> ExportOptions:
    return ExportOptions(ckpt=str(run.path), format=format, output=output)


def expected_logits(run: RunFolder, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return load_model(run.weights).eval()(images).numpy()


@pytest.mark.slow
def test_onnx_runtime_gives_the_models_logits_for_any_batch_size(finished: RunFolder, tmp_path: Path):
    import onnx
    import onnxruntime

    output = tmp_path / "new/model.onnx"
    assert export(options(finished, "onnx", output)) <= 1e-4
    onnx.checker.check_model(str(output))
    session = onnxruntime.InferenceSession(str(output))
    for batch_size in (1, 7):
        images = torch.randn(batch_size, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected_logits(finished, images), atol=1e-4)
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.slow
def test_torch_export_gives_exactly_the_models_logits(finished: RunFolder, tmp_path: Path):
    output = tmp_path / "model.pt2"
    assert export(options(finished, "pt2", output)) == 0
    module = torch.export.load(output).module()
    images = torch.randn(7, 3, 32, 32)
    with torch.inference_mode():
        assert np.array_equal(module(images).numpy(), expected_logits(finished, images))
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_exported_network_is_evaluated_with_its_own_metadata(
    evaluated: RunFolder, image_folder: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture
):
    """Class names, preprocessing and origin are in the file; the counts equal those of the weights."""
    expected = json.loads(evaluated.evaluation.read_text())
    output = tmp_path / f"model.{format}"
    export(ExportOptions(ckpt=str(evaluated.path), format=format, output=output))
    facts = read_facts(output)
    assert facts["class_names"] == expected["class_names"]
    assert facts["exported_from"] == sha256_of(evaluated.weights)

    scored = evaluate(
        EvalOptions(ckpt=str(output), data=str(image_folder), workers=0, output=tmp_path / "scored.json", batch_size=5)
    )
    result = json.loads((tmp_path / "scored.json").read_text())
    for name in ("top1_correct", "top5_correct", "class_top1_correct", "image_size", "resize_size", "top1_right"):
        assert result[name] == expected[name], name
    assert scored.loss == pytest.approx(expected["loss"], abs=1e-4)
    assert (result["file"], result["exported_from"]) == (output.name, expected["weights_sha256"])
    assert result["weights_sha256"] == sha256_of(output)
    assert "an exported network, computed on the CPU, 6 classes" in capsys.readouterr().out

    with pytest.raises(UserError, match="takes images of 32 px, not of 48; leave out --image-size"):
        evaluate(EvalOptions(ckpt=str(output), data=str(image_folder), workers=0, image_size=48))
    with pytest.raises(UserError, match=r"is an exported network, for evaluate\.py only"):
        load_model(output)


@pytest.mark.slow
def test_evaluated_exports_are_published(finished: RunFolder, tmp_path: Path):
    """Each format in the run folder with its evaluation adds a file and a row."""
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    for format in ("onnx", "pt2"):
        network = run.path / f"model.{format}"
        export(ExportOptions(ckpt=str(run.path), format=format, output=network))
        evaluate(EvalOptions(ckpt=str(network), workers=0, output=run.path / f"eval.{format}.json"))
    folder = build_hub_folder(run, "me/tiny")
    card = (folder / "README.md").read_text()
    for format in ("onnx", "pt2"):
        assert sha256_of(folder / f"model.{format}") == sha256_of(run.path / f"model.{format}")
        assert re.search(
            rf"^\| the same images, with `model.{format}` \| val \| 12 \| 36 px, bilinear \| 32 px \|", card, re.M
        )
    assert card.count("only one of the two classifies 0 images correctly.") == 2

    (run.path / "model.onnx").write_bytes(b"replaced")
    with pytest.raises(UserError, match=r"eval\.onnx\.json: not of model\.onnx: .*; export and"):
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
        export(options(finished, "safetensors", output))
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


def test_a_missing_package_is_named(finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_module, "_write", lambda format, model, images, path, facts: path.touch())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'resnet-in1k\[export\]'"):
        export(options(finished, "onnx", tmp_path / "model.onnx"))
    assert not any(tmp_path.iterdir())
