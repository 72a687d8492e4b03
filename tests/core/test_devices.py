from pathlib import Path

import psutil
import pytest
import torch

from resnet_in1k.core import devices
from resnet_in1k.core.errors import ProcessError, UserError


@pytest.mark.parametrize(
    ("has_cuda", "forced", "expected"),
    [(True, None, "cuda"), (True, "false", "cuda"), (True, "True", "cpu"), (True, "1", "cpu"), (False, None, "cpu")],
)
def test_device_is_cuda_unless_the_cpu_is_forced(monkeypatch, has_cuda: bool, forced: str | None, expected: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if forced is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", forced)
    assert devices.device_type() == expected


@pytest.mark.parametrize(("visible", "wanted"), [(1, 2), (2, 8)])
def test_too_few_gpus_are_refused_with_their_number(monkeypatch: pytest.MonkeyPatch, visible: int, wanted: int):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(wanted))
    gpus = {1: "1 GPU is", 2: "2 GPUs are"}[visible]
    words = f"{wanted} processes .* only {gpus} visible; set num_processes: {visible} .*CUDA_VISIBLE"
    with pytest.raises(UserError, match=words):
        devices.check_enough_gpus()


@pytest.mark.parametrize(("visible", "wanted"), [(0, 2), (2, 2), (8, 2)])
def test_enough_gpus_or_none_at_all_are_accepted(monkeypatch: pytest.MonkeyPatch, visible: int, wanted: int):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(wanted))
    devices.check_enough_gpus()


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


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_fast_on_a_gpu_that_does_not_emulate_it(monkeypatch: pytest.MonkeyPatch, supported: bool):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert devices.has_fast_bf16("cuda") is supported


@pytest.mark.parametrize(
    ("physical", "allowed", "quota", "expected"),
    [(8, 16, 1 << 20, 8), (8, 2, 1 << 20, 2), (8, 16, 3, 3), (None, 4, 1 << 20, 4)],
)
def test_usable_cores_are_the_least_of_three_limits(monkeypatch, physical, allowed: int, quota: int, expected: int):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(allowed)))
    monkeypatch.setattr(devices, "_container_cores", lambda: quota)
    assert devices.usable_cores() == expected


@pytest.mark.parametrize(("text", "cores"), [("400000 100000\n", 4), ("50000 100000\n", 1), ("max 100000\n", 1 << 20)])
def test_container_quota_in_cores(tmp_path: Path, text: str, cores: int):
    (tmp_path / "cpu.max").write_text(text)
    assert devices._container_cores(tmp_path / "cpu.max") == cores
    assert devices._container_cores(tmp_path / "absent") == 1 << 20


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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA error"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_in_inference_is_explained(error: RuntimeError, expected: bool):
    explained = r"^out of memory with 12 images in a forward pass for evaluation \(.+\); take a smaller --image-size"
    with (
        pytest.raises(ProcessError if expected else RuntimeError, match=explained if expected else str(error)),
        devices.inference_memory_explained(12),
    ):
        raise error


def test_cpu_allocator_is_recognised():
    """Its own message, for more memory than there are addresses."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert devices.is_out_of_memory(error.value)
