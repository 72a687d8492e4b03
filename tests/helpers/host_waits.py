"""Count where the host waits for a device, and where it copies to it; for a real device and for the emulated one."""

import os
import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
READS |= {"unique_consecutive", "bincount", "repeat_interleave"}
"""Operators that read a value or a size."""
OWN = ("resnet_in1k", "/timm/", "torch/optim", "torch/amp", "tests/")


def place() -> str:
    """Return the innermost lines of the project, its tests, or an optimizer."""
    frames = [each for each in traceback.extract_stack() if any(part in each.filename for part in OWN)]
    frames = [each for each in frames if os.path.basename(each.filename) not in HELPERS]
    return " < ".join(f"{os.path.basename(each.filename)}:{each.lineno}" for each in reversed(frames[-3:]))


HELPERS = (os.path.basename(__file__), "emulated_accelerator.py")


class HostWaits(TorchDispatchMode):
    """Number of waits and of copies to the device in the body of its `with`, by operator and place in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.copies = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet, kwargs = function.overloadpacket, kwargs or {}
        if packet is aten.to:  # inference mode does not divide it
            with self:
                return function.decompose(*args, **kwargs)
        copied, waits = _copies_and_waits(packet, args, kwargs)
        if copied or waits:
            name = f"{packet.__name__} at {place()}"
            self.copies.update([name] * copied)
            self.waits.update([name] * waits)
        return function(*args, **kwargs)


def _copies_and_waits(packet, args: tuple, kwargs: dict) -> tuple[bool, bool]:
    if packet in (aten.copy_, aten._to_copy):
        source = args[1] if packet is aten.copy_ else args[0]
        to = args[0].device if packet is aten.copy_ else torch.device(kwargs.get("device") or source.device)
        copied = source.device.type == "cpu" and to.type != "cpu"
        asynchronous = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
        # From memory that is not pinned the host waits, because the device copies it in parts.
        waits = copied and not (asynchronous and source.is_pinned())
        return copied, waits or source.device.type != "cpu" == to.type
    if all(each.device.type == "cpu" for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)):
        return False, False
    index = [each for each in args[1] if each is not None] if packet in (aten.index, aten.index_put_) else []
    copied = any(each.device.type == "cpu" for each in index)
    is_mask = any(each.dtype in (torch.bool, torch.uint8) for each in index)  # the host needs its number of values
    return copied, copied or is_mask or packet.__name__ in READS
