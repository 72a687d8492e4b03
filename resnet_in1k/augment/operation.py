"""What an augmentation operation is, and what operations share."""

from typing import Protocol

import torch
from torch import Tensor

Draws = dict[str, Tensor]
"""What was drawn for a batch, each (B, …), on the CPU, so that choosing by them needs no device sync."""


class Operation(Protocol):
    """One augmentation, for whole batches, each image with its own parameters.

    Images that are mixed with one another must be the neighbours (2k, 2k + 1) of the batch: on any number of
    processes whose share is even they are in the same part of it.
    """

    name: str
    """Keys the operation's random stream: two operations with different names draw independently."""

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        """The parameters for a global batch, on the CPU."""
        ...

    def apply(self, images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) float32 of 0 to 255, and (B,) int64 class indices or (B, C) float probabilities; the draws are
        those of these B images. The targets may come back as probabilities."""
        ...


def to_device(values: Tensor, like: Tensor) -> Tensor:
    """Copy draws to where `like` is, without making the host wait for the device."""
    if like.device.type == "cuda":
        values = values.pin_memory()
    return values.to(like.device, non_blocking=True)


def uniform(generator: torch.Generator, size: int, low: float, high: float) -> Tensor:
    return torch.empty(size).uniform_(low, high, generator=generator)
