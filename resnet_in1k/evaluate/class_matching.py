"""Which outputs of a model are the classes of the data: matched by name, never by position alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_in1k.data.registry import check_same_classes
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import printable
from resnet_in1k.utils.imagenet import human_names


@dataclass(frozen=True)
class ClassMatch:
    """For each class of the data, the model's output for it."""

    columns: tuple[int, ...]
    num_outputs: int

    @property
    def is_identity(self) -> bool:
        return self.columns == tuple(range(self.num_outputs))

    def describe(self) -> str:
        """In words, what is done with the logits; "" for nothing."""
        if self.is_identity:
            return ""
        number = len(self.columns)
        if number < self.num_outputs:
            return (
                f"only {number} of the model's {self.num_outputs} classes are in the data: the logits of the others "
                "are left out, which makes the task easier"
            )
        return "the model has the same classes in another order: its logits are put in the data's"

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        return model if self.is_identity else SelectedLogits(model, self.columns)


class SelectedLogits(torch.nn.Module):
    """A model with some of its logits, in an order of its own."""

    def __init__(self, model: torch.nn.Module, columns: Sequence[int]):
        super().__init__()
        self.model = model
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, self.columns]


def find_classes(model_names: Sequence[str], data_names: Sequence[str]) -> tuple[int, ...] | None:
    """For each class of the data its place among the model's; None if one is not there. See `match_classes`."""
    names = [printable(name) for name in data_names]  # as those of the weights
    for ours, theirs in ((list(model_names), names), (human_names(model_names), human_names(names))):
        if ours == theirs:
            return tuple(range(len(ours)))
        places = {name: ours.index(name) for name in theirs if ours.count(name) == 1}  # two of ImageNet's may be alike
        if len(places) == len(names):
            return tuple(places.values())
    if all(name.isdecimal() and int(name) < len(model_names) for name in names):
        return tuple(int(name) for name in names)
    return None


def match_classes(
    model_names: Sequence[str] | None, num_outputs: int, data_names: Sequence[str], data: str, checkpoint: str
) -> ClassMatch:
    """Find the data's classes among the model's: by folder names, or by the names of ImageNet's WordNet ids. Folders
    0, 1, 2 … of a model of other names are positions, as ImageNetV2's are.

    Args:
        model_names: in the order of its outputs; None if nothing says them: then as many classes in the same order.

    Raises:
        UserError: if the model does not have all classes of the data.
    """
    names = [printable(name) for name in data_names]  # as those of the weights
    if model_names is None:
        if len(names) != num_outputs:
            raise UserError(
                f"{checkpoint} has {num_outputs} classes, but {data} has {len(names)}: these are not the data it was "
                "trained for"
            )
        return ClassMatch(tuple(range(num_outputs)), num_outputs)
    if len(model_names) != num_outputs:
        raise UserError(f"{checkpoint} has {num_outputs} classes, but {len(model_names)} names beside it")
    if (columns := find_classes(model_names, data_names)) is not None:
        return ClassMatch(columns, num_outputs)
    check_same_classes(model_names, "the run", names, data, where=checkpoint)
    raise UserError(
        f"{checkpoint}: the classes of {data} cannot be told apart by their names; name folders by WordNet id"
    )
