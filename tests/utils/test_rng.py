import itertools

import numpy as np
import torch

from resnet_in1k.utils import rng
from resnet_in1k.utils.rng import Stream


def test_key_is_the_64_bits_of_numpys_seed_sequence():
    """NumPy promises that a seed sequence stays the same; a changed key would change every run."""
    for numbers in [(0, Stream.WEIGHTS), (3, Stream.AUGMENT, 7, 4), (2**40, Stream.ORDER, 1)]:
        expected = np.random.SeedSequence([int(number) for number in numbers]).generate_state(2).view(np.uint64)[0]
        assert rng.key(*numbers) == expected
    assert rng.key(0, Stream.WEIGHTS) == 15793235383387715774
    assert rng.key(3, Stream.AUGMENT, 7, 4) == 6391245099081448613


def test_streams_have_numbers_of_their_own():
    """In recorded runs: never renumbered."""
    assert {stream.name: stream.value for stream in Stream} == {
        "WEIGHTS": 0,
        "ORDER": 1,
        "CROP": 2,
        "AUGMENT": 3,
        "POLICY": 4,
        "FLIP": 5,
        "STOCHASTIC_DEPTH": 6,
    }


def test_every_seed_stream_and_position_draws_otherwise():
    positions = itertools.product(range(3), Stream, range(3), range(3))
    draws = [torch.rand(2, generator=rng.generator(*position)).tolist() for position in positions]
    assert len({tuple(draw) for draw in draws}) == 3 * len(Stream) * 3 * 3


def test_global_generator_draws_as_one_of_the_same_key():
    torch.manual_seed(0)
    rng.key_global_generator(5, Stream.CROP, 1, 2)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=rng.generator(5, Stream.CROP, 1, 2)))
