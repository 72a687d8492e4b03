import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.utils import parse_flag_from_env
from helpers import emulated_accelerator as emulation

from resnet_in1k.utils import device as devices
from resnet_in1k.utils import distributed
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch


@pytest.fixture
def emulated_device() -> Iterator[None]:
    if devices.device_type() != "cpu" or not emulation.IS_SUPPORTED:
        pytest.skip("no emulated device beside a real one, or before torch 2.14")
    with emulation.emulated():
        yield


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
def test_a_device_lacks_what_cannot_be_done_there(emulated_device: None, monkeypatch, error: Exception):
    assert devices.capabilities.__wrapped__(emulation.NAME) == devices.CAPABILITIES.keys()
    monkeypatch.setattr(torch, "Stream", raises(error))
    assert devices.capabilities.__wrapped__(emulation.NAME) == devices.CAPABILITIES.keys() - {"streams"}


def test_a_device_that_gives_the_stream_of_the_computation_again_has_none_beside_it(emulated_device: None, monkeypatch):
    monkeypatch.setattr(torch, "Stream", torch.accelerator.current_stream)
    assert "streams" not in devices.capabilities.__wrapped__(emulation.NAME)


def test_memory_is_not_pinned_where_the_gpu_shares_the_hosts():
    assert not devices._try_pinned_memory(torch.device("mps"))


@pytest.fixture
def old_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02\nGCC version: 9.4\n")
    monkeypatch.setattr(distributed, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    for variable in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)


def test_driver_whose_gpus_torch_does_not_see_is_an_error(old_driver: None):
    with pytest.raises(UserError, match=r"no GPU, .* NVIDIA driver 470\.57\.02\. .*CUDA 13\.0, .*--index-url"):
        distributed.make_accelerator(Launch())


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (os.environ, "ACCELERATE_USE_CPU", "true"),  # as the message advises
        (os.environ, "CUDA_VISIBLE_DEVICES", ""),
        (torch.version, "cuda", None),
        (torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")),
        (distributed, "NVIDIA_DRIVER", Path("/nowhere")),
    ],
)
def test_driver_is_no_problem_where_gpus_are_seen_or_not_wanted(old_driver: None, monkeypatch, owner, name, value):
    setter = monkeypatch.setitem if owner is os.environ else monkeypatch.setattr
    setter(owner, name, value)
    assert distributed.unused_driver() == ""


def test_reproducible_float32_leaves_the_settings_that_inductor_reads():
    """torch raises for some of them, if its old and its new settings contradict each other."""
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    with devices.reproducible_float32():
        assert (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32) == before
    assert torch.backends.cudnn.allow_tf32


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
    assert devices.fastest_precision("cpu") == ("bf16" if expected else "no")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert devices.fastest_precision("cpu") == "no"


@pytest.mark.parametrize(("generation", "expected"), [(7, "fp16"), (6, "no")], ids=["V100 and T4", "P100"])
def test_gpus_without_bf16_use_fp16_if_they_are_fast_at_it(monkeypatch, generation: int, expected: str):
    cuda = SimpleNamespace(is_bf16_supported=lambda including_emulation: False)
    monkeypatch.setattr(torch, "get_device_module", {"cuda": cuda}.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (generation, 0))
    assert devices.fastest_precision("cuda") == expected


def test_bf16_is_asked_of_other_devices_in_their_own_way(monkeypatch: pytest.MonkeyPatch):
    modules = {
        "cuda": SimpleNamespace(is_bf16_supported=lambda including_emulation: True),
        "xpu": SimpleNamespace(is_bf16_supported=lambda including_emulation: including_emulation),  # it emulates it
        "npu": SimpleNamespace(is_bf16_supported=lambda: True),  # knows of no emulation
        "mps": SimpleNamespace(),
    }
    monkeypatch.setattr(torch, "get_device_module", modules.__getitem__)
    assert [devices.fastest_precision(device) for device in modules] == ["bf16", "no", "bf16", "no"]


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
