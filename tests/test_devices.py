from pathlib import Path

import pytest
import torch

from resnet_in1k import devices
from resnet_in1k.errors import UserError


@pytest.mark.parametrize(("visible", "wanted"), [(1, 2), (2, 8)])
def test_too_few_gpus_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch, visible: int, wanted: int):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(wanted))
    words = f"{wanted} processes .* only {visible} GPUs? (is|are) visible; set num_processes: {visible} .*CUDA_VISIBLE"
    with pytest.raises(UserError, match=words):
        devices.make_accelerator()


@pytest.mark.parametrize(("visible", "wanted"), [(0, 2), (2, 2), (8, 2)])
def test_enough_gpus_or_none_at_all_pass(monkeypatch: pytest.MonkeyPatch, visible: int, wanted: int):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(wanted))
    devices.check_enough_gpus()


def test_unrelated_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    """A launch of two in which Accelerate sees only one: each would train alone and write over the other."""
    from accelerate import Accelerator

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(devices, "Accelerator", lambda **kwargs: Accelerator.__new__(Accelerator))
    monkeypatch.setattr(Accelerator, "num_processes", 1)
    with pytest.raises(UserError, match="2 processes were launched, but this one sees 1"):
        devices.make_accelerator()


@pytest.mark.parametrize(
    ("launched", "asked", "fast", "expected"),
    [
        ("no", "auto", True, "bf16"),
        ("no", "auto", False, "no"),
        ("fp16", "auto", True, "fp16"),
        ("bf16", "auto", False, "bf16"),
        ("bf16", "fp32", True, "no"),
        (None, "auto", True, "bf16"),
    ],
)
def test_precision_follows_the_launch_then_the_device(monkeypatch, launched, asked, fast, expected):
    chosen = {}

    class Recorder:
        num_processes, device, log_with = 1, torch.device("cpu"), []

        def __init__(self, **how: object):
            chosen.update(how)

    monkeypatch.setattr(devices, "Accelerator", Recorder)
    monkeypatch.setattr(devices, "has_fast_bf16", lambda device: fast)
    if launched is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    devices.make_accelerator(asked)
    assert chosen["mixed_precision"] == expected


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_bf16_is_fast_where_the_cpu_has_instructions_for_it(monkeypatch, instructions: dict, expected: bool):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert devices.has_fast_bf16(torch.device("cpu")) is expected


def test_physical_cores_are_shared_out_among_the_processes(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(devices, "usable_cores", lambda: 2)
    try:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert devices.choose_cpu_threads(torch.device("cpu"), None) == torch.get_num_threads() == 2
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert devices.choose_cpu_threads(torch.device("cpu"), None) == torch.get_num_threads() == 1
        assert devices.choose_cpu_threads(torch.device("cpu"), 2) == torch.get_num_threads() == 2
        with pytest.raises(UserError, match="--cpu-threads 0"):
            devices.choose_cpu_threads(torch.device("cpu"), 0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("text", "cores"), [("400000 100000\n", 4), ("50000 100000\n", 1), ("max 100000\n", 1 << 20)])
def test_a_containers_quota_counts(tmp_path: Path, text: str, cores: int):
    (tmp_path / "cpu.max").write_text(text)
    assert devices._container_cores(tmp_path / "cpu.max") == cores
    assert devices._container_cores(tmp_path / "absent") == 1 << 20


def test_workers_come_from_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "usable_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert devices.choose_workers(torch.device("cuda"), None) == 8
    assert devices.choose_workers(torch.device("cpu"), None) == 1
    assert devices.choose_workers(torch.device("cpu"), 5) == 5
    with pytest.raises(UserError, match="--workers -1"):
        devices.choose_workers(torch.device("cpu"), -1)


@pytest.mark.parametrize(("name", "message"), [("abacus", "unknown tracker.*tensorboard"), ("wandb", "not installed")])
def test_a_tracker_that_cannot_report_is_refused(name: str, message: str):
    with pytest.raises(UserError, match=f"--report-to {name}: {message}"):
        devices.make_accelerator("fp32", report_to=name)
