"""Weights that a training starts from (`--init-from`), in place of random ones."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from resnet_in1k.evaluate.class_matching import find_classes
from resnet_in1k.model.resnet import architecture_of
from resnet_in1k.model.resolve import Weights, resolve_checkpoint
from resnet_in1k.model.weights import read_weights
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count
from resnet_in1k.utils.launch import Launch

HEAD = ("fc.weight", "fc.bias")


@dataclass(frozen=True)
class InitialWeights:
    """What a training starts from."""

    facts: dict[str, Any]
    """For recipe.json: `checkpoint` as given, `origin` if it was downloaded, `sha256`, `architecture`, `head`."""
    tensors: dict[str, Tensor] | None
    """The model's state dict, without the head if that is new; None if the run goes on from a checkpoint."""
    note: str = ""
    """What a user should know; "" for nothing."""

    def describe(self) -> str:
        return f"{self.facts['checkpoint']}, {self.facts['head']}"


def initial_weights(
    checkpoint: str | None, recipe: Recipe, class_names: tuple[str, ...], folder: RunFolder, launch: Launch
) -> InitialWeights | None:
    """None without `--init-from`.

    A run that has a checkpoint does not need the initial weights any more: then they may be gone.

    Raises:
        UserError: if they cannot be read or are of another architecture, or not those that the run was started from.
    """
    recorded = read_recipe(folder, type(recipe))[1].get("init_from") if folder.recipe.exists() else None
    has_started = folder.recipe.exists()
    if has_started and (recorded or {}).get("checkpoint") != checkpoint:
        raise UserError(
            f"{folder.path} was started from {recorded['checkpoint'] if recorded else 'random weights'}, not from "
            f"{checkpoint or 'random weights'}; resume with the same --init-from, or choose another --output-dir"
        )
    if checkpoint is None:
        return None
    if recorded is not None and any(folder.checkpoints.glob("step_*/state.json")):
        return InitialWeights(recorded, tensors=None)
    launch.broadcast_from_main(lambda: resolve_checkpoint(checkpoint).file.name, "reads the initial weights")
    weights = resolve_checkpoint(checkpoint)  # on the main process's machine downloaded by now
    sha256 = files.sha256_of(weights.file)
    if recorded is not None and recorded["sha256"] != sha256:
        raise UserError(f"{checkpoint} has changed since {folder.path} was started from it; take another --output-dir")
    tensors = read_weights(weights.file)
    architecture = architecture_of(tensors, weights.file)
    if architecture != recipe.model:
        raise UserError(
            f"--init-from {checkpoint} is a {architecture}, and the recipe's model a {recipe.model}; give --model "
            f"{architecture}"
        )
    head = _fit_head(tensors, weights, class_names)
    facts = {
        "checkpoint": checkpoint,
        "origin": weights.origin,
        "sha256": sha256,
        "architecture": architecture,
        "head": head,
    }
    return InitialWeights(facts, tensors, _note_on_normalization(weights))


def _fit_head(tensors: dict[str, Tensor], weights: Weights, class_names: tuple[str, ...]) -> str:
    """Keep the rows of the head that are the data's classes, or leave it out; in words, which."""
    num_outputs = len(tensors["fc.weight"])
    if weights.class_names is not None and len(weights.class_names) == num_outputs:
        columns = find_classes(weights.class_names, class_names)
        if columns is not None:
            for name in HEAD:
                tensors[name] = tensors[name][list(columns)]
            kept = "its head" if len(columns) == num_outputs else f"{len(columns)} of its head's {num_outputs} classes"
            return f"with {kept}"
        reason = "its classes are others"
    else:
        reason = "nothing names its classes"
    for name in HEAD:
        del tensors[name]
    return f"with a new head of {count(len(class_names), 'class', 'es')}, as {reason}"


def _note_on_normalization(weights: Weights) -> str:
    if (weights.mean, weights.std) == (imagenet.MEAN, imagenet.STD):
        return ""
    return (
        f"the initial weights are made for images normalized by mean {weights.mean} and std {weights.std}; training "
        "normalizes by ImageNet's"
    )
