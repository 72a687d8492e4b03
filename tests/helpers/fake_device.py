"""A device without values: a guard against what would make the host wait for it, and streams that are recorded."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
"""Computes shapes, but no values: whatever needs one, as `.item()`, `if tensor` or `.nonzero()`, raises."""


class HostWaits(AssertionError):
    pass


class HostMustNotWait(TorchDispatchMode):
    """Raises where the host would wait for a device, besides what has no value to wait for.

    That is where a tensor is made there from values of Python, or one of the CPU's is used beside one of the device's:
    it would be copied from memory that is not pinned. Copies of whole tensors to the device are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_copies = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        fused = "_fused_" in str(operator)  # updates in place, for which there are no rules of shapes
        result = None if fused else operator(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        on_cpu = [each for each in tensors if each.device.type == "cpu" and each.dim()]
        on_device = [each for each in tensors if each.device.type != "cpu"]
        if operator is torch.ops.aten._to_copy.default and result.device.type != args[0].device.type:
            if result.device.type == "cpu":
                raise HostWaits("a copy to the host")
            self.num_copies += 1
        elif on_device and (on_cpu or operator is torch.ops.aten.lift_fresh.default):
            raise HostWaits(f"{operator} of values on the host")
        return result


class FakeStream:
    """Writes down what is done with it."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log, self.device = name, log, META

    def __enter__(self) -> "FakeStream":
        self.log.append(f"on {self.name}")
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"off {self.name}")

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def fake_streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let torch give streams "compute" and "side", and write down here what is done with them and with tensors."""
    log: list[str] = []
    compute, side = FakeStream("compute", log), FakeStream("side", log)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch, "Stream", lambda device: side)

    def record_stream(tensor: torch.Tensor, stream: FakeStream) -> None:
        log.append(f"{tuple(tensor.shape)} used on {stream.name}")

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    return log
