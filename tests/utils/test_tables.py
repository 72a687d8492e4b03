import pytest

from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.validation import lookup


def test_choice_is_the_entry_of_that_name():
    assert lookup({"sgd": 1, "adam": 2}, "adam", "optimizer") == 2


def test_misspelt_name_gets_a_suggestion():
    words = r"^--lr-schedule cosin: must be one of cosine, step; perhaps you meant cosine$"
    with pytest.raises(UserError, match=words):
        lookup({"step": 1, "cosine": 2}, "cosin", "lr_schedule")


def test_name_unlike_any_other_gets_none():
    with pytest.raises(UserError, match=r"^--loss xyz: must be one of cross_entropy$"):
        lookup({"cross_entropy": 1}, "xyz", "loss")
