"""ResNet.from_pretrained and predict: trained weights in other programs, without the packages that training needs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.decode import decode
from resnet_in1k.model import resnet
from resnet_in1k.model.resolve import DEFAULT_PREPROCESSING, resolve_checkpoint
from resnet_in1k.utils.device import reproducible_float32
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import human_names


class ResNet(resnet.ResNet, PyTorchModelHubMixin):
    """torchvision's ResNet with the Hub's `from_pretrained`, class names and preprocessing."""

    class_names: list[str] | None = None
    """Readable names in the order of the logits; None if they are not recorded."""
    preprocessing: EvalPreprocessing = DEFAULT_PREPROCESSING
    """Preprocessing of `predict`, equal to that of the weights' evaluation."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **client_options: Any
    ) -> "ResNet":
        """Load weights, class names and preprocessing, strictly, in eval mode.

        Unlike the mixin's own method it executes no pickle and determines the architecture from the tensors.

        Args:
            pretrained_model_name_or_path: a run folder, checkpoint folder or file; USER/NAME on the Hub; or
                `torchvision/MODEL.WEIGHTS`.
            revision: branch, tag or commit of the repository.
            client_options: `token`, `cache_dir` … of huggingface_hub's snapshot_download.

        Raises:
            UserError: if there are no weights of a ResNet, or the repository cannot be downloaded.
        """
        weights = resolve_checkpoint(pretrained_model_name_or_path, revision=revision, **client_options)
        model = resnet.load_model(weights.file, cls)
        names = weights.class_names
        model.class_names = human_names(names) if names and len(names) == model.fc.out_features else None
        model.preprocessing = weights.preprocessing()
        return model.eval()

    def predict(self, image: str | Path | Image.Image, top_k: int = 5) -> list[tuple[str, float]]:
        """Return names and probabilities of the most probable classes, best first, as scripts/predict.py prints them.

        Args:
            image: a file, or a Pillow image; a Pillow image is not rotated by its EXIF orientation.

        Raises:
            UserError: if the file cannot be read.
        """
        if isinstance(image, Image.Image):
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        else:
            try:
                pixels = decode(np.frombuffer(bytearray(Path(image).read_bytes()), dtype=np.uint8))
            except (OSError, ValueError) as error:
                raise UserError(f"{image} cannot be read ({error})") from None
        preprocessing, device, was_training = self.preprocessing, self.fc.weight.device, self.training
        square = preprocessing.crop(pixels).unsqueeze(0).to(device)
        self.eval()
        try:
            with torch.inference_mode(), reproducible_float32():
                probabilities = self(normalize(square, preprocessing.mean, preprocessing.std)).softmax(dim=1)[0]
        finally:
            self.train(was_training)
        best = probabilities.topk(min(top_k, len(probabilities)))
        names = self.class_names or [f"class {number}" for number in range(len(probabilities))]
        return [(names[index], value) for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
