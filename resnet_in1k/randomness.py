"""Nothing random has a state: every draw is a function of numbers that are known everywhere.

What is drawn for image i in epoch e depends on (seed, e, i); what is drawn for step s on (seed, s). So any run can be
taken up at any step, on any number of processes and workers, and goes on with the very same images.
"""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a draw is for: streams of one seed are independent of one another."""

    WEIGHTS = 0
    ORDER = 1
    CROP = 2
    AUGMENT = 3


def key(seed: int, stream: Stream, *position: int) -> int:
    """A 64-bit seed for the draws of one stream at one position, by NumPy's SeedSequence."""
    low, high = np.random.SeedSequence((seed, stream, *position)).generate_state(2)
    return int(low) | int(high) << 32


def generator(seed: int, stream: Stream, *position: int) -> torch.Generator:
    return torch.Generator().manual_seed(key(seed, stream, *position))


def key_global_generator(seed: int, stream: Stream, *position: int) -> None:
    """Keys torch's own CPU generator, which torchvision's transforms draw from and cannot be told not to.

    Unlike `torch.manual_seed` it leaves the accelerators' generators alone, and costs microseconds.
    """
    torch.default_generator.manual_seed(key(seed, stream, *position))
