"""Matching of the data's classes to a model's outputs."""

import pytest
import torch

from resnet_in1k.evaluate.class_matching import SelectedLogits, describe_match, match_classes
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import names_by_wnid, wnids_of

WNIDS = list(names_by_wnid())


def match(model_names: list[str] | None, data_names: list[str], num_outputs: int = 0) -> tuple[int, ...]:
    return match_classes(model_names, num_outputs or len(model_names), data_names, "data/mine", "some/weights")


def test_the_same_classes_in_the_same_order():
    assert match(["a", "b"], ["a", "b"]) == match(None, ["x", "y"], 2) == (0, 1)
    assert describe_match((0, 1), 2) == ""


def test_a_different_order_is_corrected():
    columns = match(["cat", "ant", "bee"], ["ant", "bee", "cat"])
    logits = SelectedLogits(torch.nn.Identity(), columns)(torch.tensor([[0.3, 0.1, 0.2]]))
    assert logits.tolist() == [pytest.approx([0.1, 0.2, 0.3])]
    assert "in a different order" in describe_match(columns, 3)


def test_some_of_imagenets_classes_match_by_wordnet_id_or_name():
    """Imagenette's first and last class: tench is ImageNet's first, parachute its 702nd."""
    for names in (["n01440764", "n03888257"], ["tench", "parachute"]):
        assert match(WNIDS, names) == (0, 701)
    assert "only 2 of the model's 1000 classes are in the data" in describe_match((0, 701), 1000)


def test_folders_named_by_numbers_are_positions_not_sorted_as_text():
    """ImageNetV2 has such folders; a model with the same class names is matched by name."""
    as_text = sorted(str(number) for number in range(1000))
    assert as_text[:3] == ["0", "1", "10"]
    assert match(WNIDS, as_text) == tuple(int(name) for name in as_text)
    assert match(["9", "8", "0"], ["0", "8", "9"]) == (2, 1, 0)


def test_names_that_cannot_be_printed_are_compared_escaped():
    names = ["ant\x1b[2J", "anguila_\udcf1", "nörz"]
    escaped = ["ant\\x1b[2J", "anguila_\\udcf1", "nörz"]  # as in Weights.class_names
    assert match(escaped, names) == (0, 1, 2)
    with pytest.raises(UserError, match=r"only in the run: ant\\x1b\[2J; only in data/mine: ant;"):
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
        (["a", "b"], ["a", "c"], 2, "only in the run: b; only in data/mine: c"),
        (["a", "b"], ["a", "b", "c"], 2, "only in data/mine: c"),
        (None, ["a"], 2, "has 2 classes, but data/mine has 1: different data"),
        (["a"], ["a"], 2, "has 2 classes, but 1 class names are recorded"),
        (WNIDS, ["1000"], 1000, "only in data/mine: 1000"),
    ],
)
def test_missing_classes_are_named(model_names, data_names: list, num_outputs: int, message: str):
    with pytest.raises(UserError, match=message):
        match(model_names, data_names, num_outputs)
