"""Matching of a model's outputs to the classes of the data: by name, never by position alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_in1k.data.dataset import Source
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
    model: torch.nn.Module, num_outputs: int, model_names: Sequence[str] | None, source: Source, checkpoint: str
) -> tuple[torch.nn.Module, str]:
    """Return the model with one logit for each class of the data, in their order, and a text if that is a change.

    Without `model_names` the classes of the data are taken to be the model's, in the same order.

    Raises:
        UserError: if the model does not have all classes of the data.
    """
    data_names = list(map(printable, source.class_names))
    known_names = model_names or data_names
    if len(known_names) != num_outputs:
        where = "recorded" if model_names else f"in {source.name}"
        raise UserError(f"{checkpoint} has {num_outputs} classes, but {len(known_names)} class names are {where}")
    columns = find_classes(known_names, data_names)
    if columns is None:  # then the lists differ, and this raises
        check_same_classes(known_names, "the run", data_names, source.name, where=checkpoint)
    if columns == tuple(range(num_outputs)):
        return model, ""
    text = "the model has the same classes in a different order: its logits are reordered"
    if len(columns) < num_outputs:
        share = f"{len(columns)} of the model's {num_outputs} classes"
        text = f"only {share} are in the data: the other logits are ignored, which makes the task easier"
    return SelectedLogits(model, columns), text
