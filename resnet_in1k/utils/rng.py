"""Random numbers without state: every draw is a function of numbers that are known everywhere.

The draws for image i in epoch e depend on (seed, e, i); those of an augmentation in step s on (seed, operation, s). So
a run can be resumed at any step, on any number of processes and workers, with the same images.
"""

import random
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Purpose of a draw: the streams of one seed are independent."""

    WEIGHTS = 0
    ORDER = 1
    CROP = 2
    AUGMENT = 3
    POLICY = 4
    FLIP = 5
    STOCHASTIC_DEPTH = 6


def key(seed: int, stream: Stream, *position: int) -> int:
    """Return a 64-bit seed for the draws of one stream at one position, by NumPy's SeedSequence."""
    low, high = np.random.SeedSequence((seed, stream, *position)).generate_state(2)
    return int(low) | int(high) << 32


def generator(seed: int, stream: Stream, *position: int) -> torch.Generator:
    return torch.Generator().manual_seed(key(seed, stream, *position))


def key_global_generator(seed: int, stream: Stream, *position: int) -> None:
    """Seed torch's global CPU generator, which torchvision's transforms draw from."""
    # Not torch.manual_seed, which would also seed the accelerators' generators, and takes longer.
    torch.default_generator.manual_seed(key(seed, stream, *position))


def key_global_generators(seed: int, stream: Stream, *position: int) -> None:
    """Seed the global generators of torch, Python and NumPy, which timm's transforms draw from."""
    number = key(seed, stream, *position)
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # timm uses NumPy's global generator
