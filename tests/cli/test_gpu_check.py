"""scripts/gpu_check.py: each part at toy size on the CPU, and that a failure is seen; on an accelerator if there is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resnet_in1k.train.guard import DivergenceGuard

from resnet_in1k.cli import gpu_check
from resnet_in1k.cli.gpu import checks, measurements, runs
from resnet_in1k.cli.gpu.setting import CheckFailedError, LeftOutError, Setting
from resnet_in1k.evaluate import evaluation
from resnet_in1k.utils.device import device_type
from resnet_in1k.utils.distributed import make_accelerator
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return Setting(make_accelerator(Launch()), Launch(), tmp_path, "synthetic", toy=True)


@pytest.mark.parametrize("name", checks.CHECKS)
def test_check_passes_on_a_cpu(toy: Setting, name: str):
    assert checks.CHECKS[name](toy)


@pytest.mark.gpu
@pytest.mark.skipif(device_type() == "cpu", reason="no accelerator")
@pytest.mark.parametrize("name", checks.CHECKS)
def test_check_passes_on_the_accelerator(name: str, tmp_path: Path):
    assert checks.CHECKS[name](Setting(make_accelerator(Launch()), Launch(), tmp_path, "synthetic", toy=True))


def test_augmentation_that_differs_is_seen(toy: Setting, monkeypatch: pytest.MonkeyPatch):
    """On the first call, for the reference, it is whole."""
    whole, calls = checks.Augmentation.apply, []

    def second_differs(self, images, labels, draws):
        calls.append(1)
        pixels, targets = whole(self, images, labels, draws)
        return (pixels + 0.05 * (len(calls) == 2), targets)

    monkeypatch.setattr(checks.Augmentation, "apply", second_differs)
    monkeypatch.setattr("resnet_in1k.augment.pipeline.CPU_CHUNK", 1000)
    with pytest.raises(CheckFailedError, match="of the values differ by more than one gray level"):
        checks.augmentation_equals_the_cpus(toy)


def test_prefetching_that_loses_bytes_is_seen(toy: Setting, monkeypatch: pytest.MonkeyPatch):
    whole = checks.prefetch_to_device

    def reused(batches, device, prepare):
        for prefetched in whole(batches, device, prepare):
            (images,) = prefetched.tensors()
            images[0, 0, 0, 0] ^= 1
            yield type(prefetched)({}, lambda images=images: (images,))

    monkeypatch.setattr(checks, "prefetch_to_device", reused)
    with pytest.raises(CheckFailedError, match="12 of 12 batches have other bytes"):
        checks.prefetching_keeps_every_byte(toy)


def test_evaluation_that_depends_on_the_batch_is_seen(toy: Setting, monkeypatch: pytest.MonkeyPatch):
    whole = evaluation.predict_batch

    def depends(model, images, labels, indices):
        return whole(model, images + 0.01 * len(labels), labels, indices)

    monkeypatch.setattr(checks, "predict_batch", depends)
    with pytest.raises(CheckFailedError, match="differ"):
        checks.evaluation_does_not_depend_on_the_batch(toy)


def test_weights_that_change_after_divergence_are_seen(toy: Setting, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DivergenceGuard, "loss_for_backward", lambda self, loss: loss)
    monkeypatch.setattr(DivergenceGuard, "step", lambda self, loss: torch.enable_grad())
    with pytest.raises(CheckFailedError, match="weights changed"):
        checks.no_weight_changes_after_a_loss_that_is_not_finite(toy)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in measurements.MEASUREMENTS if name != "processes"])
def test_measurement_has_rows_or_says_why_not(toy: Setting, name: str):
    rows = measurements.MEASUREMENTS[name](toy)
    assert all(row.value > 0 if row.value is not None else row.note.startswith("left out: ") for row in rows)
    assert any(row.value for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.RUNS)
def test_whole_runs(toy: Setting, name: str):
    if name == "out_of_memory":
        with pytest.raises(LeftOutError, match="on a CPU"):
            runs.RUNS[name](toy)
    else:
        assert runs.RUNS[name](toy)


def parts(monkeypatch: pytest.MonkeyPatch, **by_name: Callable[[Setting], object]) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(gpu_check, "PARTS", by_name)


def raising(error: Exception) -> Callable[[Setting], object]:
    def part(setting: Setting) -> object:
        raise error

    return part


def test_report_names_what_failed_and_what_was_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    parts(
        monkeypatch,
        good=lambda setting: "as it should be",
        bad=raising(CheckFailedError("7 | 8 differ")),
        broken=raising(ImportError("No module named 'triton'\nmore")),
        absent=raising(LeftOutError("no such device")),
        bandwidth=lambda setting: [measurements.Row("copy", 1234.5, "GB/s", "fast"), measurements.Row("b", None, "")],
    )
    assert not gpu_check.gpu_check(gpu_check.GpuCheckOptions(output_dir=tmp_path / "out"))
    text = (tmp_path / "out/gpu_check.md").read_text()
    for line in (
        "| good | passed | as it should be |",
        "| bad | failed | 7 / 8 differ |",
        "| broken | failed | ImportError: No module named 'triton' |",
        "| absent | left out | no such device |",
        "| copy | 1,234 GB/s | fast |",
        "| b | not measured |  |",
        "toy size: shows that the command works; not measured on a GPU",
    ):
        assert line in text.splitlines()
    result = json.loads((tmp_path / "out/gpu_check.json").read_text())
    assert [part["status"] for part in result["parts"]] == ["passed", "failed", "failed", "left out", "measured"]
    assert result["parts"][4]["rows"][0] == {"what": "copy", "value": 1234.5, "unit": "GB/s", "note": "fast"}
    assert "failed    bad" in capsys.readouterr().out


def test_time_that_has_run_out_leaves_out_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    parts(monkeypatch, first=lambda setting: "seen")
    assert gpu_check.gpu_check(gpu_check.GpuCheckOptions(output_dir=tmp_path, minutes=1e-9))
    assert "left out  first            no time left; give more --minutes" in capsys.readouterr().out


def test_parts_that_do_not_suit_the_launch_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="--only rotation: must be of device, augmentation, "):
        gpu_check.GpuCheckOptions(only=("rotation",))
    with pytest.raises(UserError, match="--only processes: start it with several processes, by accelerate launch"):
        gpu_check.gpu_check(gpu_check.GpuCheckOptions(only=("processes",), output_dir=tmp_path))


@pytest.mark.slow
def test_command_of_two_processes(run_script, tmp_path: Path):
    """The one part that needs them, and the exit status."""
    result = run_script("scripts/gpu_check.py", "--output-dir", tmp_path, config="two_gpu.yaml")
    assert result.returncode == 0, result.stderr
    (part,) = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert part["name"] == "processes"
    assert "3 gloo:all_reduce" in part["rows"][0]["note"]


def test_exit_status_of_a_failure(monkeypatch: pytest.MonkeyPatch):
    import runpy
    import sys

    from helpers.processes import ROOT

    monkeypatch.setattr(sys, "argv", ["scripts/gpu_check.py"])
    monkeypatch.setattr(gpu_check, "gpu_check", lambda options: False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(ROOT / "scripts/gpu_check.py"), run_name="__main__")
