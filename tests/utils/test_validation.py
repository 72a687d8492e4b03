from dataclasses import dataclass, field

import pytest

from resnet_in1k.utils.validation import invalid_fields, within


@pytest.mark.parametrize(
    ("metadata", "words", "inside", "outside"),
    [
        (within(at_least=1), "at least 1", [1, 2.5, 1e9], [0, 0.99]),
        (within(above=0), "above 0", [1e-9, 5], [0, -1]),
        (within(above=0, at_most=1), "above 0 and at most 1", [1e-9, 1], [0, 1.01]),
        (within(at_least=0, at_most=0.5), "at least 0 and at most 0.5", [0, 0.5], [-0.01, 0.51]),
        (within(at_least=0, below=1), "at least 0 and below 1", [0, 0.999], [-0.01, 1]),
    ],
)
def test_range_in_words_and_at_its_ends(metadata, words: str, inside: list[float], outside: list[float]):
    @dataclass
    class Options:
        value: float = field(metadata=metadata)

    for value in inside:
        assert list(invalid_fields(Options(value))) == []
    for value in [*outside, float("nan"), float("inf")]:
        assert [(name, text) for name, text, _ in invalid_fields(Options(value))] == [("value", words)]
