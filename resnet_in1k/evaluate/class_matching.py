"""Matching of a model's outputs to the classes of the data: by name, never by position alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_in1k.data.registry import check_same_classes
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import printable
from resnet_in1k.utils.imagenet import human_names


class SelectedLogits(torch.nn.Module):
    """A model with only some of its logits, in the given order."""

    def __init__(self, model: torch.nn.Module, columns: Sequence[int]):
        super().__init__()
        self.model = model
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, self.columns]


def find_classes(model_names: Sequence[str], data_names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the model's output for each class of the data; None if a class is missing.

    Names are compared unchanged, then with WordNet ids replaced by ImageNet's names. If neither matches, folders named
    0, 1, 2 … are positions, as in ImageNetV2.
    """
    data_names = list(map(printable, data_names))  # as in Weights.class_names
    for known, wanted in ((list(model_names), data_names), (human_names(model_names), human_names(data_names))):
        if known == wanted:
            return tuple(range(len(known)))
        columns = {name: known.index(name) for name in wanted if known.count(name) == 1}
        if len(columns) == len(wanted):  # no name occurs twice
            return tuple(columns.values())
    if all(name.isdecimal() and int(name) < len(model_names) for name in data_names):
        return tuple(map(int, data_names))
    return None


def match_classes(
    model_names: Sequence[str] | None, num_outputs: int, data_names: Sequence[str], data: str, checkpoint: str
) -> tuple[int, ...]:
    """Return the model's output for each class of the data, by `find_classes`.

    Without `model_names` the data must have `num_outputs` classes, which are taken to be in the model's order.

    Raises:
        UserError: if the model does not have all classes of the data.
    """
    if model_names is None:
        if len(data_names) == num_outputs:
            return tuple(range(num_outputs))
        raise UserError(f"{checkpoint} has {num_outputs} classes, but {data} has {len(data_names)}: different data")
    if len(model_names) != num_outputs:
        raise UserError(f"{checkpoint} has {num_outputs} classes, but {len(model_names)} class names are recorded")
    columns = find_classes(model_names, data_names)
    if columns is None:  # then the lists differ, and this raises
        check_same_classes(model_names, "the run", list(map(printable, data_names)), data, where=checkpoint)
    return columns


def describe_match(columns: tuple[int, ...], num_outputs: int) -> str:
    """Describe what SelectedLogits does to a model's logits; "" if it changes nothing."""
    if columns == tuple(range(num_outputs)):
        return ""
    if len(columns) < num_outputs:
        share = f"{len(columns)} of the model's {num_outputs} classes"
        return f"only {share} are in the data: the other logits are ignored, which makes the task easier"
    return "the model has the same classes in a different order: its logits are reordered"
