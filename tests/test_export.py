import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file

from resnet_in1k import export as E
from resnet_in1k.checkpoint import save_weights
from resnet_in1k.errors import UserError
from resnet_in1k.export import ExportOptions, export
from resnet_in1k.files import sha256_of
from resnet_in1k.model import ResNet, load_model
from resnet_in1k.run_folder import RunFolder


def options(run: RunFolder, format: str, output: Path) -> ExportOptions:
    return ExportOptions(ckpt=str(run.path), format=format, output=output)


def expected_logits(run: RunFolder, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return load_model(run.weights).eval()(images).numpy()


def test_onnx_runtime_gives_the_models_logits_for_any_batch(finished: RunFolder, tmp_path: Path):
    import onnx
    import onnxruntime

    output = tmp_path / "new/model.onnx"
    assert export(options(finished, "onnx", output)) <= 1e-4
    onnx.checker.check_model(str(output))
    session = onnxruntime.InferenceSession(str(output))
    for size in (1, 7):
        images = torch.randn(size, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected_logits(finished, images), atol=1e-4)
    assert list(output.parent.iterdir()) == [output]


def test_torch_export_gives_the_models_logits_to_the_bit(finished: RunFolder, tmp_path: Path):
    output = tmp_path / "model.pt2"
    assert export(options(finished, "pt2", output)) == 0
    module = torch.export.load(output).module()
    images = torch.randn(7, 3, 32, 32)
    with torch.inference_mode():
        assert np.array_equal(module(images).numpy(), expected_logits(finished, images))
    assert list(tmp_path.iterdir()) == [output]


def test_what_differs_is_not_kept(finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "model.safetensors"
    output.write_text("what was there before")

    def spoil(model: ResNet, images: torch.Tensor, path: Path) -> None:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state["fc.bias"] += 1e-3
        save_weights(state, path)

    monkeypatch.setitem(E._WRITERS, "safetensors", spoil)
    with pytest.raises(UserError, match=r"the exported logits differ by .*, more than 0e\+00; .* was not written"):
        export(options(finished, "safetensors", output))
    assert output.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("wrapped", [False, True])
def test_old_weights_are_converted_without_unpickling(finished: RunFolder, tmp_path: Path, wrapped: bool):
    """As the tutorial saved them: by torch.save, `module.` before each key."""
    state = {f"module.{key}": value for key, value in load_file(finished.weights).items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "old.pth")
    output = tmp_path / "run/model.safetensors"
    assert export(ExportOptions(ckpt=str(tmp_path / "old.pth"), format="safetensors", output=output)) == 0
    assert sha256_of(output) == sha256_of(finished.weights)
    torchvision.models.resnet18(num_classes=6).load_state_dict(load_file(output), strict=True)


def test_old_weights_to_the_hub_folder(finished: RunFolder, image_folder: Path, tmp_path: Path):
    """The README's three commands: convert, evaluate, publish."""
    from resnet_in1k.hub import build_hub_folder
    from resnet_in1k.scoring import EvalOptions, evaluate_checkpoint

    torch.save(load_file(finished.weights), tmp_path / "old.pth")
    run = RunFolder(tmp_path / "runs/old")
    export(ExportOptions(ckpt=str(tmp_path / "old.pth"), format="safetensors", output=run.weights))
    evaluate_checkpoint(
        EvalOptions(ckpt=str(run.path), data=str(image_folder), image_size=32, output=run.evaluation, workers=0)
    )
    card = (build_hub_folder(run, "me/old") / "README.md").read_text()
    assert "trained elsewhere and evaluated on" in card


def test_a_pickle_bomb_is_refused(tmp_path: Path):
    bomb = tmp_path / "old.pth"
    bomb.write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "boom").encode() + b"\ntR.")
    with pytest.raises(UserError, match="holds no plain tensors"):
        export(ExportOptions(ckpt=str(bomb), format="safetensors", output=tmp_path / "a.safetensors"))
    assert not (tmp_path / "boom").exists()


def test_the_wrong_ending_and_a_missing_package_are_named(finished: RunFolder, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match=r"ends in .onnx for --format onnx"):
        export(options(finished, "onnx", tmp_path / "model.pb"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"--format onnx needs onnx.*: pip install 'resnet-in1k\[export\]'"):
        export(options(finished, "onnx", tmp_path / "model.onnx"))
    assert not (tmp_path / "model.onnx").exists()
    shutil.rmtree(tmp_path)
