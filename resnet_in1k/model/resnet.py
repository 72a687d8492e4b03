"""torchvision's ResNet, and its weights from a file."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torchvision
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_in1k.model.weights import load_strictly, read_weights, weights_file
from resnet_in1k.recipes.recipe import Architecture
from resnet_in1k.utils.errors import UserError

LAYOUTS: dict[Architecture, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
"""Kind and number of residual blocks in the four stages (https://arxiv.org/abs/1512.03385, table 1)."""


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet: the same modules, keys, initial weights and logits.

    Args:
        architecture: torchvision's name, resnet18 to resnet152.
        num_classes: width of the last layer.
        zero_init_residual: start each residual branch at zero (https://arxiv.org/abs/1706.02677).
    """

    def __init__(
        self, architecture: Architecture = "resnet50", num_classes: int = 1000, zero_init_residual: bool = False
    ):
        block, blocks = LAYOUTS[architecture]
        super().__init__(block, list(blocks), num_classes=num_classes, zero_init_residual=zero_init_residual)
        self.architecture = architecture

    def features(self, images: Tensor) -> Tensor:
        """Compute the input of the last layer: (B, 3, S, S) float32, normalized, to (B, F) float32."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.avgpool(maps).flatten(1)


Model = TypeVar("Model", bound=ResNet)


def load_model(checkpoint: Path, model_class: type[Model] = ResNet) -> Model:
    """Load a model; the tensors decide the architecture and the number of classes.

    Raises:
        UserError: if there are no weights, or they are not those of a torchvision ResNet.
    """
    file = weights_file(checkpoint)
    state = read_weights(file)
    architecture, last_layer = architecture_of(state, file), state["fc.weight"]
    if last_layer.numel() == 0 or last_layer.ndim == 0:  # an empty tensor may claim any number of classes
        raise UserError(f"{file}: its last layer, of shape {tuple(last_layer.shape)}, has no classes")
    model = model_class(architecture, num_classes=len(last_layer))
    load_strictly(model, state, file)
    return model


def architecture_of(state: Mapping[str, Tensor], file: Path) -> Architecture:
    """Return the ResNet that these tensors belong to, by their names. Raises UserError if there is none."""
    for architecture in LAYOUTS:
        if _keys_of(architecture) == state.keys():
            return architecture
    raise UserError(f"{file} is not a torchvision ResNet: its tensor names are not those of {', '.join(LAYOUTS)}")


@functools.cache
def _keys_of(architecture: Architecture) -> frozenset[str]:
    with torch.device("meta"):  # names only: no memory, no initialization
        return frozenset(ResNet(architecture).state_dict())
