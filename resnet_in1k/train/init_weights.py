"""Initial weights of a training run from `--init-from`."""

from typing import Any

from torch import Tensor

from resnet_in1k.evaluate.class_matching import find_classes
from resnet_in1k.model.resnet import architecture_of
from resnet_in1k.model.resolve import Weights, resolve_checkpoint
from resnet_in1k.model.weights import read_weights
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.console import print_line
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count
from resnet_in1k.utils.launch import Launch


def initial_weights(
    checkpoint: str | None,
    recipe: Recipe,
    class_names: tuple[str, ...],
    folder: RunFolder,
    started_with: dict[str, Any],
    launch: Launch,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return `init_from` of recipe.json, and the state dict that `--init-from` names, without the last layer if that is
    new. Both are empty without the flag.

    A run that already has a checkpoint does not need its initial weights, which may have been deleted.

    Args:
        started_with: recipe.json of a run that is resumed, else empty.
    """
    recorded = started_with.get("init_from")
    if started_with and (before := recorded["checkpoint"] if recorded else None) != checkpoint:
        raise UserError(
            f"{folder.path} was started from {before or 'random weights'}, not from {checkpoint or 'random weights'}; "
            "resume with the same --init-from, or choose another --output-dir"
        )
    if checkpoint is None:
        return {}, {}
    if recorded and any(folder.checkpoints.glob("step_*/state.json")):
        return recorded, {}
    launch.on_main_process(lambda: resolve_checkpoint(checkpoint).file.name, "reading the initial weights")
    weights = resolve_checkpoint(checkpoint)  # the main process has downloaded them by now
    sha256 = files.sha256_of(weights.file)
    if recorded and recorded["sha256"] != sha256:
        raise UserError(f"{checkpoint} has changed since {folder.path} was started; choose another --output-dir")
    tensors = read_weights(weights.file)
    model = architecture_of(tensors, weights.file)
    if model != recipe.model:
        advice = f"give --model {model}"
        raise UserError(f"--init-from {checkpoint} is a {model}, but the recipe's model is a {recipe.model}; {advice}")
    mean, std = weights.preprocessing.mean, weights.preprocessing.std
    if (mean, std) != (imagenet.MEAN, imagenet.STD):
        print_line(f"{checkpoint} was trained on images of mean {mean} and std {std}; this run uses ImageNet's")
    head = _fit_head(tensors, weights, class_names)
    facts = {"checkpoint": checkpoint, "origin": weights.origin, "sha256": sha256, "architecture": model, "head": head}
    return facts, tensors


def _fit_head(tensors: dict[str, Tensor], weights: Weights, class_names: tuple[str, ...]) -> str:
    """Select the last layer's rows of the data's classes, or remove the layer; return what was done, as text."""
    num_outputs, names = len(tensors["fc.weight"]), weights.class_names
    has_names = names is not None and len(names) == num_outputs
    columns = find_classes(names, class_names) if has_names else None
    if columns is None:
        del tensors["fc.weight"], tensors["fc.bias"]
        reason = "the class names differ" if has_names else "its classes have no names"
        return f"with a new head of {count(len(class_names), 'class', 'es')}, because {reason}"
    for name in ("fc.weight", "fc.bias"):
        tensors[name] = tensors[name][list(columns)]
    is_complete = len(columns) == num_outputs
    return "with its head" if is_complete else f"with {len(columns)} of its head's {num_outputs} classes"
