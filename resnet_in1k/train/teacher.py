"""The teacher of a training run: a fixed network whose predictions the model learns to repeat."""

import hashlib
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from resnet_in1k.data.dataset import Source
from resnet_in1k.evaluate.class_matching import match_classes
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.model.weights import sha256_of_weights, weights_to_save
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import train_image_size
from resnet_in1k.utils import imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line
from resnet_in1k.utils.launch import Launch

TIMM = "timm:"
"""Prefix of the names of timm's models."""


class Teacher(torch.nn.Module):
    """Logits for the classes of the data, (B, C), from images as the trained model gets them, (B, 3, S, S)."""

    def __init__(self, network: torch.nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        """`mean`, `std`: of the images that the network was trained on, per channel, for RGB values from 0 to 1."""
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        ours, theirs = ((torch.tensor(a), torch.tensor(b)) for a, b in ((imagenet.MEAN, imagenet.STD), (mean, std)))
        self._is_ours = (tuple(mean), tuple(std)) == (imagenet.MEAN, imagenet.STD)
        self.register_buffer("scale", (ours[1] / theirs[1]).view(3, 1, 1))
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images if self._is_ours else images * self.scale + self.shift)


def check_teacher(recipe: Recipe, checkpoint: str | None) -> None:
    """Raise UserError if there is a teacher without a weight in the loss, or a weight without a teacher."""
    if recipe.teacher_weight and checkpoint is None:
        advice = "such as a run folder, USER/NAME on the Hub or timm:NAME"
        raise UserError(f"the recipe's teacher_weight is {recipe.teacher_weight:g}: give --teacher, {advice}")
    if checkpoint is not None and not recipe.teacher_weight:
        raise UserError(f"--teacher {checkpoint} needs a share of the loss: give --teacher-weight, such as 0.5")


def load_teacher(
    checkpoint: str, recipe: Recipe, source: Source, started_with: dict[str, Any], launch: Launch
) -> tuple[dict[str, Any], Teacher]:
    """Return `teacher` of recipe.json, and the network that `--teacher` names.

    Args:
        started_with: recipe.json of a run that is resumed, else empty.

    Raises:
        UserError: if the network cannot be loaded, does not know all classes of the data or does not take images of the
            recipe's sizes, or if the run was started with another one.
    """
    launch.on_main_process(lambda: _load(checkpoint)[0], "reading the teacher")
    facts, network, class_names, mean, std = _load(checkpoint)  # the main process has downloaded it by now
    recorded = started_with.get("teacher")
    if started_with and facts["sha256"] != (recorded or {}).get("sha256"):
        was = f"the teacher {recorded['checkpoint']}" if recorded else "no teacher"
        raise UserError(
            f"the run was started with {was}, and --teacher {checkpoint} is another one; resume with the same weights, "
            "or choose another --output-dir"
        )
    network, facts["outputs"] = match_classes(network, facts.pop("num_outputs"), class_names, source, checkpoint)
    teacher = Teacher(network, mean, std)
    for size in sorted({train_image_size(recipe, epoch) for epoch in range(1, recipe.epochs + 1)}):
        try:
            teacher(torch.zeros(2, 3, size, size))
        except Exception as error:  # networks raise errors of many kinds
            problem = f"does not take images of {size} px ({first_line(error)})"
            raise UserError(f"--teacher {checkpoint} {problem}; train at its --image-size") from None
    return facts, teacher


def _load(checkpoint: str) -> tuple[dict[str, Any], torch.nn.Module, list[str] | None, Any, Any]:
    """Return facts, network, class names, mean and std."""
    if checkpoint.startswith(TIMM):
        return _load_timm(checkpoint)
    weights = resolve_checkpoint(checkpoint)
    network = weights.exported or load_model(weights.file, weights.wanted)
    facts = {"origin": weights.origin, "sha256": sha256_of_weights(weights.file)}
    facts |= {"architecture": network.architecture, "num_outputs": network.num_outputs}
    preprocessing = weights.preprocessing
    return {"checkpoint": checkpoint, **facts}, network, weights.class_names, preprocessing.mean, preprocessing.std


def _load_timm(checkpoint: str) -> tuple[dict[str, Any], torch.nn.Module, None, Any, Any]:
    import timm

    name = checkpoint.removeprefix(TIMM)
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # of timm for an unknown name; of the Hub's client, which have no common base class
        advice = "timm.list_models(pretrained=True) lists the names"
        raise UserError(f"--teacher {checkpoint} cannot be loaded ({first_line(error)}); {advice}") from None
    digest = hashlib.sha256(safetensors.torch.save(weights_to_save(network))).hexdigest()
    facts = {"checkpoint": checkpoint, "origin": checkpoint, "sha256": digest}
    facts |= {"architecture": name.partition(".")[0], "num_outputs": network.num_classes}
    return facts, network, None, network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
