"""Exported networks: their logits, and one line for each file that cannot be used."""

import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.bomb import Bomb

from resnet_in1k.model.exported import load_exported
from resnet_in1k.utils.errors import UserError


class Tiny(torch.nn.Module):
    """(B, 3, 8, 8) to (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.mean(dim=(2, 3)))


class TwoInputs(torch.nn.Module):
    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return (images + others).mean(dim=(2, 3))


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported by another program, without metadata, for batches of two images."""
    folder, model = tmp_path_factory.mktemp("exported"), Tiny().eval()
    torch.onnx.export(model, (IMAGES[:2],), str(folder / "a.onnx"), dynamo=True, external_data=False, verbose=False)
    torch.export.save(torch.export.export(model, (IMAGES[:2],)), folder / "a.pt2")
    return {path.suffix: path for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_any_number_of_images_by_a_network_for_two_at_a_time(exported: dict[str, Path], suffix: str):
    network = load_exported(exported[suffix])
    assert (network.image_size, network.num_outputs) == (8, 4)
    with torch.inference_mode():
        expected = Tiny()(IMAGES)
        for number in (1, 2, 5):
            np.testing.assert_allclose(network(IMAGES[:number]), expected[:number], atol=1e-6)
    assert network.facts == {}


class Half(Tiny):
    """With float16 weights, images and logits, as exported for a phone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.float()).half()


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_images_are_converted_to_the_networks_type(tmp_path: Path, suffix: str):
    model, file, half = Half().eval(), tmp_path / f"a{suffix}", IMAGES.half()
    if suffix == ".onnx":
        torch.onnx.export(model, (half,), str(file), dynamo=True, external_data=False, verbose=False)
    else:
        torch.export.save(torch.export.export(model, (half,)), file)
    with torch.inference_mode():
        logits = load_exported(file)(IMAGES)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits, Tiny()(half.float()).detach(), atol=1e-3)


def test_pixels_that_are_not_normalized_are_refused(tmp_path: Path):
    model, pixels = Half().eval(), IMAGES.byte()
    torch.onnx.export(model, (pixels,), str(tmp_path / "a.onnx"), dynamo=True, external_data=False, verbose=False)
    torch.export.save(torch.export.export(model, (pixels,)), tmp_path / "a.pt2")
    for name in ("a.onnx", "a.pt2"):
        with pytest.raises(
            UserError, match=r"its input is .*uint8\)?; export it for float32 images, normalized outside"
        ):
            load_exported(tmp_path / name)


def test_weights_in_another_file_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "network").mkdir()
    file = tmp_path / "network/a.onnx"
    model = Tiny().eval()
    model.fc = torch.nn.Linear(3, 400)  # smaller tensors stay in the file
    program = torch.onnx.export(model, (IMAGES,), dynamo=True, verbose=False)
    program.save(str(file), external_data=True)
    assert [path.name for path in sorted(file.parent.iterdir())] == ["a.onnx", "a.onnx.data"]
    monkeypatch.chdir(tmp_path)
    np.testing.assert_allclose(load_exported(file)(IMAGES), model(IMAGES).detach(), atol=1e-6)
    (file.parent / "a.onnx.data").unlink()
    with pytest.raises(UserError, match=r"a\.onnx cannot be read as an exported network \(.*a\.onnx\.data"):
        load_exported(file)


def test_a_network_that_fails_is_one_line(tmp_path: Path):
    torch.export.save(torch.export.export(Tiny(), (IMAGES,)), tmp_path / "a.pt2")
    with pytest.raises(UserError, match=r"the network fails for images \(5, 3, 9, 9\): ") as caught:
        load_exported(tmp_path / "a.pt2")(torch.zeros(5, 3, 9, 9))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_damaged_file_is_one_line(exported: dict[str, Path], suffix: str, tmp_path: Path):
    data = exported[suffix].read_bytes()
    for number, content in enumerate((b"", data[: len(data) // 2], b"something else")):
        (tmp_path / f"{number}{suffix}").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as an exported network") as caught:
            load_exported(tmp_path / f"{number}{suffix}")
        assert "\n" not in str(caught.value)


def test_pickles_in_an_archive_are_not_executed(exported: dict[str, Path], tmp_path: Path):
    """Plain torch.export.load executes them: it falls back to an unlimited reader."""
    changed = 0
    with zipfile.ZipFile(exported[".pt2"]) as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for name in old.namelist():
            is_pickle = "sample_inputs" in name
            changed += is_pickle
            new.writestr(name, pickle.dumps(Bomb(tmp_path / "executed")) if is_pickle else old.read(name))
    assert changed
    with pytest.raises(UserError, match="cannot be read as an exported network"):
        load_exported(tmp_path / "bad.pt2")
    assert not (tmp_path / "executed").exists()


def test_a_network_that_takes_no_images_is_an_error(tmp_path: Path):
    model, vectors = torch.nn.Linear(3, 4), torch.zeros(2, 3)
    torch.onnx.export(model, (vectors,), str(tmp_path / "a.onnx"), dynamo=True, external_data=False, verbose=False)
    torch.export.save(torch.export.export(model, (vectors,)), tmp_path / "a.pt2")
    torch.export.save(torch.export.export(TwoInputs(), (IMAGES, IMAGES)), tmp_path / "b.pt2")
    for name in ("a.onnx", "a.pt2", "b.pt2"):
        with pytest.raises(UserError, match="does not map images"):
            load_exported(tmp_path / name)


def test_a_missing_package_is_named(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    assert onnxruntime
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"a.onnx needs onnxruntime: pip install onnx onnxscript onnxruntime"):
        load_exported(exported[".onnx"])
