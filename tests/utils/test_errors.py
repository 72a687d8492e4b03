import pytest
import torch
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torch.distributed import DistBackendError, DistNetworkError

from resnet_in1k.utils.errors import ProcessError, translate_errors

MEMORY = r"^out of memory with 12 images in a forward pass \(.+\); use less$"
LOST = r"^process 3 lost its connection to the other processes \({}\): one has ended, .* resume with --resume$"
CANNOT_COMMUNICATE = r"^process 3 cannot communicate with the others: {}; NCCL_DEBUG=INFO prints more, .*/dev/shm"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA error"), MEMORY),
        (RuntimeError("CUDA error: out of memory"), MEMORY),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MEMORY),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            r"^a loader worker died \(.*\); .*/dev/shm.*fewer --workers$",
        ),
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:5] Connection closed by peer [::1]:4"),
            LOST.format(r"Connection .*\]:4"),
        ),
        (
            RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms"),
            LOST.format("Timed out .*ms"),
        ),
        (
            DistBackendError("NCCL error: remote process exited or there was a network error\nmore"),
            LOST.format("NCCL .* error"),
        ),
        (
            DistBackendError("NCCL error: remote process exited or network error\nLast error:\nNo route to host"),
            LOST.format("NCCL .* network error; Last error: No route to host"),
        ),
        # Nobody has ended: all that the library says, in one line.
        (
            DistBackendError("unhandled system error\nError while creating /dev/shm/1"),
            CANNOT_COMMUNICATE.format("unhandled .* creating .*"),
        ),
        (
            RuntimeError("[/gloo/transport/tcp/device.cc:84] Unable to find interface for: eth7"),
            CANNOT_COMMUNICATE.format(r"\[/gloo.* eth7"),
        ),
        (DistNetworkError("Connection refused"), CANNOT_COMMUNICATE.format("Connection refused")),
        (
            InductorError(InvalidCxxCompiler(), None),
            r"^--compile failed \(InvalidCxxCompiler: No working C\+\+ .*\); install one .*, or leave out --compile$",
        ),
    ],
)
def test_error_of_torch_is_explained_in_one_line(monkeypatch: pytest.MonkeyPatch, error: RuntimeError, words: str):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ProcessError, match=words) as raised, translate_errors(12, "use less"):
        raise error
    assert "\n" not in str(raised.value)


def test_without_a_connection_before_nobody_is_lost(monkeypatch: pytest.MonkeyPatch):
    """At the start an unreachable address looks to NCCL like a process that has ended."""
    monkeypatch.setenv("RANK", "3")
    words = CANNOT_COMMUNICATE.format("NCCL error: remote process exited Last error: No route to host")
    with pytest.raises(ProcessError, match=words), translate_errors(is_connected=False):
        raise DistBackendError("NCCL error: remote process exited\nLast error:\nNo route to host")


@pytest.mark.parametrize("text", ["Timed out in user code", "mat1 and mat2 shapes cannot be multiplied"])
def test_error_of_another_kind_is_not_explained(text: str):
    with pytest.raises(RuntimeError, match=f"^{text}$"), translate_errors(12, "use less"):
        raise RuntimeError(text)
