from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.utils import parse_flag_from_env
from helpers.fake_device import fake_streams

from resnet_in1k.utils import device as devices


@pytest.mark.parametrize(
    ("accelerator", "expected"),
    [("cuda", "cuda"), ("mps", "mps"), ("npu", "npu"), ("mtia", "cpu"), (None, "cpu")],  # Accelerate knows no mtia
)
def test_device_is_the_accelerator(monkeypatch: pytest.MonkeyPatch, accelerator: str | None, expected: str):
    found = accelerator and SimpleNamespace(type=accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert devices.device_type() == expected


@pytest.mark.parametrize("value", ["1", "0", "true", "TRUE", "yes", "no", "y", "t", "on", "off", "f"])
def test_the_cpu_is_forced_by_what_accelerate_takes_for_true(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert (devices.device_type() == "cpu") is parse_flag_from_env("ACCELERATE_USE_CPU")


def raises(error: BaseException) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Backend doesn't support create a new Stream."),
        NotImplementedError("record_stream"),
        AssertionError("Torch not compiled with XPU enabled"),
        AttributeError("is_bf16_supported"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_device_lacks_what_cannot_be_done_there(monkeypatch: pytest.MonkeyPatch, error: Exception):
    fake_streams(monkeypatch)
    assert "streams" in devices.capabilities.__wrapped__("meta")
    monkeypatch.setattr(torch, "Stream", raises(error))
    assert "streams" not in devices.capabilities.__wrapped__("meta")


def test_streams_are_tried_as_prefetching_uses_them(monkeypatch: pytest.MonkeyPatch):
    """A device that gives the stream of the computation again has none beside it."""
    log = fake_streams(monkeypatch)
    assert "streams" in devices.capabilities.__wrapped__("meta")
    assert log == ["on side", "off side", "compute waits for side", "(1,) used on compute"]
    monkeypatch.setattr(torch, "Stream", torch.accelerator.current_stream)
    assert "streams" not in devices.capabilities.__wrapped__("meta")


def test_a_cpu_has_fused_optimizers_only_and_misses_nothing():
    assert devices.capabilities.__wrapped__("cpu") == {"fused_optimizers"}
    assert devices.missing_capabilities("cpu") == []


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_bf16_is_fast_where_the_cpu_has_instructions_for_it(monkeypatch, instructions: dict, expected: bool):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert devices.has_fast_bf16("cpu") is expected
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert devices.has_fast_bf16("cpu") is False


def test_bf16_is_asked_of_other_devices_in_their_own_way(monkeypatch: pytest.MonkeyPatch):
    modules = {
        "cuda": SimpleNamespace(is_bf16_supported=lambda including_emulation: True),
        "xpu": SimpleNamespace(is_bf16_supported=lambda including_emulation: including_emulation),  # it emulates it
        "npu": SimpleNamespace(is_bf16_supported=lambda: True),  # knows of no emulation
        "mps": SimpleNamespace(),
    }
    monkeypatch.setattr(torch, "get_device_module", modules.__getitem__)
    assert [devices.has_fast_bf16(device) for device in modules] == [True, False, True, False]


@pytest.mark.parametrize(
    ("physical", "allowed", "quota", "expected"),
    [
        (8, 16, "max 100000\n", 8),
        (8, 2, "max 100000\n", 2),
        (8, 16, "350000 100000\n", 3),
        (8, 16, "50000 100000\n", 1),
        (None, 4, None, 4),
    ],
)
def test_usable_cores_are_the_least_of_three_limits(monkeypatch, tmp_path, physical, allowed, quota, expected):
    """Of the machine, of this process, and of its container."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(allowed)))
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    assert devices.usable_cores() == expected


def test_physical_cores_are_divided_among_the_processes(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(devices, "usable_cores", lambda: 2)
    try:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert devices.choose_cpu_threads(torch.device("cpu"), None) == torch.get_num_threads() == 2
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert devices.choose_cpu_threads(torch.device("cpu"), None) == torch.get_num_threads() == 1
        assert devices.choose_cpu_threads(torch.device("cpu"), 2) == torch.get_num_threads() == 2
        assert devices.choose_cpu_threads(torch.device("cuda"), None) == 2  # a GPU's process keeps torch's number
    finally:
        torch.set_num_threads(threads)


def test_number_of_workers_follows_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "usable_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(devices, "device_type", lambda: "cuda")
    assert devices.choose_workers(None) == 8
    assert devices.choose_workers(0) == 0
    monkeypatch.setattr(devices, "device_type", lambda: "cpu")
    assert devices.choose_workers(None) == 1
    assert devices.choose_workers(5) == 5
    monkeypatch.setattr(devices, "usable_cores", lambda: 256)
    assert devices.choose_workers(None) == 16
    monkeypatch.setattr(devices, "device_type", lambda: "cuda")
    assert devices.choose_workers(None) == 32  # more would not be faster
