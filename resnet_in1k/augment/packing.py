"""The draws of all operations in one buffer, so that a single copy brings them to the device.

Each copy from pageable memory would make the host wait, and each pinned tensor and each copy costs some 10 µs of the
host's time: with a few small tensors per operation, more than launching the augmentation itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_in1k.augment.operation import Arranged

ALIGNMENT = 16
"""Bytes; a multiple of the size of every dtype, as a view of the buffer by dtype needs."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the buffer."""

    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class Packed:
    """`buffer` (N,) uint8 on the CPU, and by operation what of it is whose."""

    buffer: Tensor
    layout: list[Arranged]
    """As what was packed, with places for tensors."""

    def to(self, device: torch.device) -> list[Arranged]:
        """By operation as it was packed, the tensors being views of one copy on `device`.

        The host does not wait for it, if the buffer is pinned.
        """
        copy = self.buffer.to(device, non_blocking=self.buffer.is_pinned())

        def unpacked(value: object) -> object:
            if not isinstance(value, _Place):
                return value
            return copy[value.start : value.end].view(value.dtype).view(value.shape)

        return [{name: unpacked(value) for name, value in each.items()} for each in self.layout]


def pack(arranged: list[Arranged], *, pin: bool) -> Packed:
    """Put the tensors, which must be on the CPU, one after the other; other values stay as they are.

    Args:
        arranged: by operation.
        pin: in pinned memory, from which a device copies without making the host wait.
    """
    layout: list[Arranged] = []
    tensors: list[tuple[Tensor, _Place]] = []
    end = 0
    for each in arranged:
        layout.append(dict(each))
        for name, value in each.items():
            if isinstance(value, Tensor):
                start = -(-end // ALIGNMENT) * ALIGNMENT
                end = start + value.nbytes
                layout[-1][name] = _Place(start, end, value.dtype, value.shape)
                tensors.append((value, layout[-1][name]))
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
    for tensor, place in tensors:
        buffer[place.start : place.end].view(place.dtype).view(place.shape).copy_(tensor)
    return Packed(buffer, layout)
