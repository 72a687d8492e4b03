import pytest

from resnet_in1k.utils.format import count, duration, file_size, printable, shorten


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (12.4, "12 s"),
        (60, "1 min 0 s"),
        (725, "12 min 5 s"),
        (12_000, "3 h 20 min"),
        (3_599.9, "60 min 0 s"),
        (187_000, "2 d 4 h"),
    ],
)
def test_duration_has_two_units(seconds: float, words: str):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (512e6, "512 MB"), (1.24e9, "1.2 GB"), (5e12, "5,000.0 GB")],
)
def test_file_size_is_in_decimal_units(num_bytes: float, words: str):
    assert file_size(num_bytes) == words


def test_count_has_a_plural():
    assert [count(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [count(number, "process", "es") for number in (1, 1234)] == ["1 process", "1,234 processes"]


def test_list_is_shortened_with_the_number_left_out():
    names = ["a", "b", "c", "d", "e"]
    assert shorten(names) == "a, b, c and 2 more"
    assert shorten(names, at_most=1) == "a and 4 more"
    assert shorten(names[:3]) == "a, b, c"
    assert shorten([]) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ant, été, 蚂蚁", "ant, été, 蚂蚁"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\u202e", "a\\nb\\u202e"),
        ("\x9b2J\x7f\u2028\u2066", "\\x9b2J\\x7f\\u2028\\u2066"),  # of which one character begins a command, too
        ("anguila_\udcf1", "anguila_\\udcf1"),  # a byte of a file name that is no UTF-8
        ("می\u200cخواهم, 5\u202fPM, \U0001fae9", "می\u200cخواهم, 5\u202fPM, \U0001fae9"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str):
    assert printable(text) == shown
