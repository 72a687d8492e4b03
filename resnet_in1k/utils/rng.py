"""Random numbers without state: every draw is a function of numbers that are known everywhere.

What is drawn for image i in epoch e depends on (seed, e, i); what an augmentation draws for step s on (seed, operation,
s). So a run can be resumed at any step, on any number of processes and workers, with the very same images.
"""

import random
import zlib
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a draw is for: streams of one seed are independent of one another."""

    WEIGHTS = 0
    ORDER = 1
    CROP = 2
    AUGMENT = 3
    POLICY = 4
    FLIP = 5
    STOCHASTIC_DEPTH = 6


def key(seed: int, stream: Stream, *position: int) -> int:
    """A 64-bit seed for the draws of one stream at one position, by NumPy's SeedSequence."""
    low, high = np.random.SeedSequence((seed, stream, *position)).generate_state(2)
    return int(low) | int(high) << 32


def generator(seed: int, stream: Stream, *position: int) -> torch.Generator:
    return torch.Generator().manual_seed(key(seed, stream, *position))


def name_key(name: str) -> int:
    """A number for a name, the same in every process and version: for streams that are told apart by name."""
    return zlib.crc32(name.encode())


def key_global_generator(seed: int, stream: Stream, *position: int) -> None:
    """Seed torch's own CPU generator, which torchvision's transforms draw from.

    Unlike `torch.manual_seed` it leaves the accelerators' generators alone, and takes microseconds.
    """
    torch.default_generator.manual_seed(key(seed, stream, *position))


def key_global_generators(seed: int, stream: Stream, *position: int) -> None:
    """Seed also Python's and NumPy's own generators, which timm's transforms draw from."""
    number = key(seed, stream, *position)
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # timm knows no other
