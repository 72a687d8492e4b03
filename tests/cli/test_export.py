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
from resnet_in1k.model.resnet import ResNet, load_model
from resnet_in1k.model.weights import save_weights
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
def test_an_exported_network_is_scored_by_what_it_says_of_itself(
    evaluated: RunFolder, image_folder: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture
):
    """Far from its run: class names, preprocessing and origin are in the file. The same counts as of the weights."""
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
    with pytest.raises(UserError, match=r"is an exported network, which evaluate\.py takes"):
        load_model(output)


@pytest.mark.slow
def test_what_was_scored_is_published(finished: RunFolder, tmp_path: Path):
    """Both formats in the run folder, each with its evaluation: two files and two rows more."""
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    build_hub_folder(run, "me/tiny")
    assert "exported" not in (run.path / "hub/README.md").read_text()
    for format in ("onnx", "pt2"):
        network = run.path / f"model.{format}"
        export(ExportOptions(ckpt=str(run.path), format=format, output=network))
        evaluate(EvalOptions(ckpt=str(network), workers=0, output=run.path / f"eval.{format}.json"))
    folder = build_hub_folder(run, "me/tiny")
    card = (folder / "README.md").read_text()
    for format in ("onnx", "pt2"):
        assert sha256_of(folder / f"model.{format}") == sha256_of(run.path / f"model.{format}")
        assert re.search(rf"^\| the same, by `model.{format}` \| val \| 12 \| 36 px, bilinear \| 32 px \|", card, re.M)
    assert card.count("images that only one of the two has right: 0.") == 2

    (run.path / "model.onnx").write_bytes(b"replaced")
    with pytest.raises(UserError, match=r"eval\.onnx\.json: model\.onnx has changed since; export and"):
        build_hub_folder(run, "me/tiny")
    (run.path / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"eval\.onnx\.json is of 'model\.onnx', which is not in"):
        build_hub_folder(run, "me/tiny")


def test_a_file_with_other_logits_is_not_kept(finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "model.safetensors"
    output.write_text("existing")

    def write_other_weights(model: ResNet, images: torch.Tensor, path: Path, facts: dict) -> None:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state["fc.bias"] += 1e-3
        save_weights(state, path)

    changed = export_module.FORMATS["safetensors"]._replace(write=write_other_weights)
    monkeypatch.setitem(export_module.FORMATS, "safetensors", changed)
    with pytest.raises(UserError, match=r"the exported logits differ by .*, more than 0e\+00; .* was not written"):
        export(options(finished, "safetensors", output))
    assert output.read_text() == "existing"
    assert list(tmp_path.iterdir()) == [output]


def test_old_weights_are_converted(finished: RunFolder, tmp_path: Path):
    """As training scripts saved them: by torch.save, in a checkpoint, with `module.` before each key."""
    state = {f"module.{key}": value for key, value in load_file(finished.weights).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "old.pth")
    output = tmp_path / "run/model.safetensors"
    assert export(ExportOptions(ckpt=str(tmp_path / "old.pth"), format="safetensors", output=output)) == 0
    assert sha256_of(output) == sha256_of(finished.weights)
    torchvision.models.resnet18(num_classes=6).load_state_dict(load_file(output), strict=True)


@pytest.mark.slow
def test_old_weights_are_converted_evaluated_and_packaged(finished: RunFolder, image_folder: Path, tmp_path: Path):
    """The README's three commands."""
    torch.save(load_file(finished.weights), tmp_path / "old.pth")
    run = RunFolder(tmp_path / "runs/old")
    export(ExportOptions(ckpt=str(tmp_path / "old.pth"), format="safetensors", output=run.weights))
    evaluate(EvalOptions(ckpt=str(run.path), data=str(image_folder), image_size=32, output=run.evaluation, workers=0))
    card = (build_hub_folder(run, "me/old") / "README.md").read_text()
    assert "trained elsewhere and evaluated on" in card


def test_code_in_a_pickle_is_not_executed(tmp_path: Path):
    malicious = tmp_path / "old.pth"
    malicious.write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "executed").encode() + b"\ntR.")
    with pytest.raises(UserError, match="holds no plain tensors"):
        export(ExportOptions(ckpt=str(malicious), format="safetensors", output=tmp_path / "a.safetensors"))
    assert not (tmp_path / "executed").exists()


def test_bad_options_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"must end in .onnx for --format onnx"):
        ExportOptions(ckpt="run", format="onnx", output=tmp_path / "model.pb")
    with pytest.raises(UserError, match="--image-size 0: must be at least 1"):
        ExportOptions(ckpt="run", format="onnx", output=tmp_path / "model.onnx", image_size=0)


def test_a_missing_package_is_named(finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = export_module.FORMATS["onnx"]._replace(write=lambda model, images, path, facts: path.touch())
    monkeypatch.setitem(export_module.FORMATS, "onnx", written)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'resnet-in1k\[export\]'"):
        export(options(finished, "onnx", tmp_path / "model.onnx"))
    assert not any(tmp_path.iterdir())
