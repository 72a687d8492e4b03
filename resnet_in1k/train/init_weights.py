"""Initial weights of a training run from `--init-from`."""

from typing import Any

from torch import Tensor

from resnet_in1k.evaluate.class_matching import find_classes
from resnet_in1k.model.resolve import Weights, resolve_checkpoint
from resnet_in1k.model.state_dict import read_resnet
from resnet_in1k.model.weights import sha256_of_weights
from resnet_in1k.recipes.recipe import PublishedWeights, Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.console import print_line
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count
from resnet_in1k.utils.launch import Launch


def initial_weights(
    checkpoint: str | None,
    wanted: PublishedWeights | None,
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
        wanted: the weights or their averages, if `--init-from` has both; by default the weights.
        started_with: recipe.json of a run that is resumed, else empty.
    """
    recorded = started_with.get("init_from")
    before, now = ((recorded or {}).get("checkpoint"), (recorded or {}).get("weights")), (checkpoint, wanted)
    if started_with and before != now:
        was, is_now = (" --weights ".join(filter(None, each)) or "random weights" for each in (before, now))
        raise UserError(
            f"{folder.path} was started from {was}, not from {is_now}; resume with the same --init-from and --weights, "
            "or choose another --output-dir"
        )
    if checkpoint is None:
        return {}, {}
    if recorded and any(folder.checkpoints.glob("step_*/state.json")):
        return recorded, {}
    launch.on_main_process(lambda: resolve_checkpoint(checkpoint, wanted).file.name, "reading the initial weights")
    weights = resolve_checkpoint(checkpoint, wanted)  # the main process has downloaded them by now
    sha256 = sha256_of_weights(weights.file)
    if recorded and recorded["sha256"] != sha256:
        raise UserError(f"{checkpoint} has changed since {folder.path} was started; choose another --output-dir")
    model, tensors = read_resnet(weights.file, weights.wanted)
    if model != recipe.model:
        advice = f"give --model {model}"
        raise UserError(f"--init-from {checkpoint} is a {model}, but the recipe's model is a {recipe.model}; {advice}")
    mean, std = weights.preprocessing.mean, weights.preprocessing.std
    if (mean, std) != (imagenet.MEAN, imagenet.STD):
        print_line(f"{checkpoint} was trained on images of mean {mean} and std {std}; this run uses ImageNet's")
    head = _fit_head(tensors, weights, class_names)
    facts = {"checkpoint": checkpoint, "origin": weights.origin, "sha256": sha256, "architecture": model, "head": head}
    return facts | ({"weights": wanted} if wanted else {}), tensors


def _fit_head(tensors: dict[str, Tensor], weights: Weights, class_names: tuple[str, ...]) -> str:
    """Select the last layer's rows of the data's classes, or remove the layer; return what was done, as text."""
    head = {name: tensors.pop(name) for name in ("fc.weight", "fc.bias") if name in tensors}
    num_outputs, names = len(head.get("fc.bias", ())), weights.class_names
    has_names = names is not None and len(names) == num_outputs
    columns = find_classes(names, class_names) if has_names else None
    if columns is None:
        reason = "the class names differ" if has_names else "its classes have no names"
        reason = reason if head else "it has no last layer of classes"
        return f"with a new head of {count(len(class_names), 'class', 'es')}, because {reason}"
    tensors |= {name: tensor[list(columns)] for name, tensor in head.items()}
    is_complete = len(columns) == num_outputs
    return "with its head" if is_complete else f"with {len(columns)} of its head's {num_outputs} classes"
