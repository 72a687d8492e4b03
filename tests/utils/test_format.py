import pytest

from resnet_in1k.utils.format import printable


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
