"""The data's classes among a model's."""

import pytest
import torch

from resnet_in1k.evaluate.class_matching import ClassMatch, SelectedLogits, match_classes
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import names_by_wnid, wnids_of

WNIDS = list(names_by_wnid())


def match(model_names: list[str] | None, data_names: list[str], num_outputs: int = 0) -> ClassMatch:
    return match_classes(model_names, num_outputs or len(model_names), data_names, "data/mine", "some/weights")


def test_the_same_classes_in_the_same_order_change_nothing():
    model = torch.nn.Identity()
    for found in (match(["a", "b"], ["a", "b"]), match(None, ["x", "y"], 2)):
        assert found.columns == (0, 1)
        assert found.describe() == ""
        assert found.apply(model) is model


def test_another_order_is_put_right():
    found = match(["cat", "ant", "bee"], ["ant", "bee", "cat"])
    logits = torch.tensor([[0.3, 0.1, 0.2]])
    assert found.apply(torch.nn.Identity())(logits).tolist() == [pytest.approx([0.1, 0.2, 0.3])]
    assert "in another order" in found.describe()


def test_a_part_of_imagenet_is_found_by_wordnet_id_or_name():
    """Imagenette's first and last class: tench is ImageNet's first, and parachute its 702nd."""
    for names in (["n01440764", "n03888257"], ["tench", "parachute"]):
        found = match(WNIDS, names)
        assert found.columns == (0, 701)
        assert "only 2 of the model's 1000 classes are in the data" in found.describe()
        assert isinstance(found.apply(torch.nn.Identity()), SelectedLogits)


def test_folders_that_are_numbers_are_positions_and_not_sorted_as_text():
    """As ImageNetV2 names them; a model whose own classes are numbers is matched by name."""
    as_text = sorted(str(number) for number in range(1000))
    assert as_text[:3] == ["0", "1", "10"]
    assert match(WNIDS, as_text).columns == tuple(int(name) for name in as_text)
    assert match(["9", "8", "0"], ["0", "8", "9"]).columns == (2, 1, 0)


def test_names_of_other_lists_of_imagenet_are_told_by_most_of_them():
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
        (None, ["a"], 2, "has 2 classes, but data/mine has 1: these are not the data it was trained for"),
        (["a"], ["a"], 2, "has 2 classes, but 1 names beside it"),
        (WNIDS, ["1000"], 1000, "only in data/mine: 1000"),
    ],
)
def test_classes_that_the_model_lacks_are_named(model_names, data_names: list, num_outputs: int, message: str):
    with pytest.raises(UserError, match=message) as error:
        match(model_names, data_names, num_outputs)
    assert "\n" not in str(error.value)
