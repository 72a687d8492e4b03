"""Matching of the data's classes to a model's outputs."""

from types import SimpleNamespace

import pytest
import torch

from resnet_in1k.evaluate.class_matching import match_classes
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import names_by_wnid, wnids_of

WNIDS = list(names_by_wnid())


def match(model_names: list[str] | None, data_names: list[str], num_outputs: int = 0) -> tuple[list[int], str]:
    """The model's output for each class of the data, and the description."""
    num_outputs = num_outputs or len(model_names)
    source = SimpleNamespace(name="data/mine", class_names=data_names)
    model, text = match_classes(torch.nn.Identity(), num_outputs, model_names, source, "some/weights")
    return model(torch.arange(num_outputs)[None])[0].tolist(), text


def test_the_same_classes_in_the_same_order():
    assert match(["a", "b"], ["a", "b"]) == ([0, 1], "")


def test_weights_without_names_are_matched_with_a_word():
    assert match(None, ["10", "9"], 2) == ([0, 1], "no class names with the weights: outputs 0, 1, … are 10, 9")
    columns, text = match(None, ["n01440764", "n03888257"], 1000)
    assert columns == [0, 701]
    assert text.startswith("no class names with the weights: 1000 outputs are ImageNet's\nonly 2 of the model's 1000")
    with pytest.raises(UserError, match="has 1000 classes, but 2 class names are in data/mine"):
        match(None, ["cat", "dog"], 1000)


def test_a_different_order_is_corrected():
    columns, text = match(["cat", "ant", "bee"], ["ant", "bee", "cat"])
    assert columns == [1, 2, 0]
    assert "in a different order" in text


def test_some_of_imagenets_classes_match_by_wordnet_id_or_name():
    """Imagenette's first and last class: tench is ImageNet's first, parachute its 702nd."""
    for names in (["n01440764", "n03888257"], ["tench", "parachute"]):
        columns, text = match(WNIDS, names)
        assert columns == [0, 701]
        assert "only 2 of the model's 1000 classes are in the data" in text


def test_only_imagenetv2s_thousand_numbers_are_positions():
    """Other folders named by numbers are names, as of Flowers-102 or GTSRB."""
    as_text = sorted(str(number) for number in range(1000))
    assert as_text[:3] == ["0", "1", "10"]
    assert match(WNIDS, as_text)[0] == match(None, as_text, 1000)[0] == [int(name) for name in as_text]
    assert match(["9", "8", "0"], ["0", "8", "9"])[0] == [2, 1, 0]


def test_names_that_cannot_be_printed_are_compared_escaped():
    names = ["ant\x1b[2J", "anguila_\udcf1", "nörz"]
    escaped = ["ant\\x1b[2J", "anguila_\\udcf1", "nörz"]  # as in Weights.class_names
    assert match(escaped, names) == ([0, 1, 2], "")
    with pytest.raises(UserError, match=r"only in the weights: ant\\x1b\[2J; only in data/mine: ant;"):
        match(escaped, ["ant", *names[1:]])


def test_lists_of_imagenets_names_may_differ_in_a_tenth():
    names = [f"{name}, and its synonyms" for name in names_by_wnid().values()]
    names[:90] = ["another name"] * 90
    assert wnids_of(names) == WNIDS
    names[90:120] = ["another name"] * 30
    assert wnids_of(names) is None
    assert wnids_of(names[:999]) is None


@pytest.mark.parametrize(
    ("model_names", "data_names", "num_outputs", "message"),
    [
        (
            ["a", "b"],
            ["a", "c"],
            2,
            "only in the weights: b; only in data/mine: c; train a new last layer by train.py --init-from",
        ),
        (["a", "b"], ["a", "b", "c"], 2, "only in the weights: none; only in data/mine: c"),
        (["a"], ["a"], 2, "has 2 classes, but 1 class names are recorded"),
        (WNIDS, ["1", "10", "2"], 1000, "only in data/mine: 1, 10, 2"),
        (list("abcdefghij"), list("0123456789"), 10, "only in data/mine: 0, 1, 2 and 7 more"),
    ],
)
def test_missing_classes_are_named(model_names, data_names: list, num_outputs: int, message: str):
    with pytest.raises(UserError, match=message):
        match(model_names, data_names, num_outputs)
