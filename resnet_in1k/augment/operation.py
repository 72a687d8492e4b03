"""What an augmentation operation is, and what operations share."""

from typing import Any, Protocol

import torch
from torch import Tensor

Draws = dict[str, Tensor]
"""What was drawn for a batch, each (B, …), on the CPU."""
Arranged = dict[str, Any]
"""Draws as `apply` takes them: tensors on the images' device, and values of Python, known to the host."""


class Operation(Protocol):
    """One augmentation, for whole batches, each image with its own parameters.

    Images that are mixed with one another must be the neighbors (2k, 2k + 1) of the batch: on any number of
    processes whose share is even they are in the same part of it.

    An operation may also have `arrange(draws: Draws) -> Arranged`. It is called on the CPU with the draws of the images
    that `apply` will get, and what it returns takes their place: for what the host must know, such as the size of a
    group of images, so that `apply` need not ask the device. `apply` must also take the draws as they are, and give the
    same with them: compiled, it gets those, as all shapes are then fixed.
    """

    name: str
    """Keys the operation's random stream: two operations with different names draw independently."""

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        """The parameters for a global batch, on the CPU."""
        ...

    def apply(self, images: Tensor, targets: Tensor, draws: Arranged) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) float32 of 0 to 255, and (B,) int64 class indices or (B, C) float probabilities; the draws are
        those of these B images, their tensors on the same device. The targets may come back as probabilities.

        The images may be changed in place. Nothing here may need a tensor's values on the host (`.item()`,
        `.nonzero()`, `if tensor`): the host would wait for the device."""
        ...


def uniform(generator: torch.Generator, size: int, low: float, high: float) -> Tensor:
    return torch.empty(size).uniform_(low, high, generator=generator)
