"""Training the last layer alone: the rest of the network stays as it is, with its norms' statistics."""

import torch
from torch import Tensor

from resnet_in1k.model.resnet import ResNet


class FrozenBody(torch.nn.Module):
    """The same logits as the model's in eval mode; the only parameters are those of its last layer."""

    def __init__(self, model: ResNet):
        super().__init__()
        self.fc = model.fc
        self._model = (model,)  # in a tuple it is no part of this module

    def forward(self, images: Tensor) -> Tensor:
        (model,) = self._model
        model.eval()
        with torch.no_grad():
            features = model.features(images)
        return self.fc(features)
