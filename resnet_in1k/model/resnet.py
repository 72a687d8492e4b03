"""torchvision's ResNet, with weights from a file and predictions for images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.decode import decode
from resnet_in1k.model.resolve import DEFAULT_PREPROCESSING, resolve_checkpoint
from resnet_in1k.model.weights import read_weights, weights_file
from resnet_in1k.recipes.recipe import Architecture
from resnet_in1k.utils.device import reproducible_float32
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import human_names

LAYOUTS: dict[Architecture, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
"""Kind and number of residual blocks in the four stages (https://arxiv.org/abs/1512.03385, table 1)."""


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet: the same modules, keys, initial weights and logits."""

    class_names: list[str] | None = None
    """Readable names in the order of the logits; None if they are not recorded."""
    preprocessing: EvalPreprocessing = DEFAULT_PREPROCESSING
    """Preprocessing of `predict`, equal to that of the weights' evaluation."""

    def __init__(
        self, architecture: Architecture = "resnet50", num_classes: int = 1000, zero_init_residual: bool = False
    ):
        block, blocks = LAYOUTS[architecture]
        super().__init__(block, list(blocks), num_classes=num_classes, zero_init_residual=zero_init_residual)
        self.architecture, self.num_outputs = architecture, num_classes

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, *, revision: str | None = None, **client_options: Any) -> "ResNet":
        """Load weights, class names and preprocessing, strictly, in eval mode. No pickle is executed.

        Args:
            checkpoint: a run folder, checkpoint folder or file; USER/NAME on the Hub; or `torchvision/MODEL.WEIGHTS`.
            revision: branch, tag or commit of the repository.
            client_options: `token`, `cache_dir` … of huggingface_hub's snapshot_download.

        Raises:
            UserError: if there are no weights of a ResNet, or the repository cannot be downloaded.
        """
        weights = resolve_checkpoint(checkpoint, revision=revision, **client_options)
        model, names = load_model(weights.file), weights.class_names
        model.class_names = human_names(names) if names and len(names) == model.num_outputs else None
        model.preprocessing = weights.preprocessing
        return model.eval()

    @torch.inference_mode()
    def predict(self, image: str | Path | Image.Image, top_k: int = 5) -> list[tuple[str, float]]:
        """Return names and probabilities of the most probable classes, best first, as scripts/predict.py prints them.

        A Pillow image is not rotated by its EXIF orientation. Raises UserError if a file cannot be read.
        """
        if isinstance(image, Image.Image):
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        else:
            try:
                pixels = decode(np.frombuffer(bytearray(Path(image).read_bytes()), dtype=np.uint8))
            except (OSError, ValueError) as error:
                raise UserError(f"{image} cannot be read ({error})") from None
        square = self.preprocessing.crop(pixels).unsqueeze(0).to(self.fc.weight.device)
        was_training = self.training
        try:
            with reproducible_float32():
                logits = self.eval()(normalize(square, self.preprocessing.mean, self.preprocessing.std))
        finally:
            self.train(was_training)
        best = logits[0].softmax(dim=0).topk(min(top_k, logits.shape[1]))
        names = self.class_names or [f"class {number}" for number in range(logits.shape[1])]
        return [(names[index], value) for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def load_model(checkpoint: Path) -> ResNet:
    """Load a model; the tensors decide the architecture and the number of classes. Raises UserError if there are no
    weights, or they are not those of a torchvision ResNet."""
    file = weights_file(checkpoint)
    state = read_weights(file)
    architecture, last_layer = architecture_of(state, file), state["fc.weight"]
    if last_layer.numel() == 0 or last_layer.ndim == 0:  # an empty tensor may claim any number of classes
        raise UserError(f"{file}: its last layer, of shape {tuple(last_layer.shape)}, has no classes")
    model = ResNet(architecture, num_classes=len(last_layer))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # tensors of other shapes
        raise UserError(f"{file} does not fit a {architecture}: {' '.join(str(error).split())[:200]}") from None
    return model


def architecture_of(state: Mapping[str, Tensor], file: Path) -> Architecture:
    """Return the ResNet that these tensors belong to, by their names. Raises UserError if there is none."""
    for architecture in LAYOUTS:
        with torch.device("meta"):  # names only: no memory, no initialization
            if ResNet(architecture).state_dict().keys() == state.keys():
                return architecture
    raise UserError(f"{file} is not a torchvision ResNet: its tensor names are not those of {', '.join(LAYOUTS)}")
