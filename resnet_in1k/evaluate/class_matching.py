"""Matching of a model's outputs to the classes of the data: by name, never by position alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_in1k.data.dataset import Source
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import printable, shorten
from resnet_in1k.utils.imagenet import human_names, names_by_wnid, wnids_of


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

    Names are compared unchanged, then with WordNet ids replaced by ImageNet's names. Folders named by numbers are names
    like any other, but for those of ImageNetV2: 0 … 999 are the positions of ImageNet's classes.
    """
    data_names = list(map(printable, data_names))  # as in Weights.class_names
    for known, wanted in ((list(model_names), data_names), (human_names(model_names), human_names(data_names))):
        if known == wanted:
            return tuple(range(len(known)))
        columns = {name: known.index(name) for name in wanted if known.count(name) == 1}
        if len(columns) == len(wanted):  # no name occurs twice
            return tuple(columns.values())
    if wnids_of(model_names) and sorted(data_names) == sorted(map(str, range(1000))):
        return tuple(map(int, data_names))
    return None


def match_classes(
    model: torch.nn.Module, num_outputs: int, model_names: Sequence[str] | None, source: Source, checkpoint: str
) -> tuple[torch.nn.Module, str]:
    """Return the model with one logit for each class of the data, in their order, and a text if that is a change.

    Weights without class names get ImageNet's if they have 1000 outputs and the data's classes are among them, else the
    data's, in the same order. The text reports both.

    Raises:
        UserError: if the model does not have all classes of the data.
    """
    data_names = list(map(printable, source.class_names))
    known_names, note = model_names, ""
    if not model_names:
        known_names, note = data_names, f"no class names with the weights: outputs 0, 1, … are {shorten(data_names)}"
        if num_outputs == 1000 and find_classes(list(names_by_wnid()), data_names):
            known_names, note = list(names_by_wnid()), "no class names with the weights: 1000 outputs are ImageNet's"
    if len(known_names) != num_outputs:
        where = "recorded" if model_names else f"in {source.name}"
        raise UserError(f"{checkpoint} has {num_outputs} classes, but {len(known_names)} class names are {where}")
    columns = find_classes(known_names, data_names)
    if columns is None:
        known, wanted = human_names(known_names), human_names(data_names)
        only = [shorten([name for name in a if name not in b]) or "none" for a, b in ((known, wanted), (wanted, known))]
        is_numbered = source.name.startswith("shards:") and data_names == list(map(str, range(len(data_names))))
        advice = "name the classes of the labels 0, 1, … in classes.json next to the shards, or " if is_numbered else ""
        raise UserError(
            f"{checkpoint}: its classes are not those of the data: only in the weights: {only[0]}; only in "
            f"{source.name}: {only[1]}; {advice}train a new last layer by train.py --init-from"
        )
    if columns == tuple(range(num_outputs)):
        return model, note
    text = "the model has the same classes in a different order: its logits are reordered"
    if len(columns) < num_outputs:
        share = f"{len(columns)} of the model's {num_outputs} classes"
        text = f"only {share} are in the data: the other logits are ignored, which makes the task easier"
    return SelectedLogits(model, columns), "\n".join(filter(None, [note, text]))
