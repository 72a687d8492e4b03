"""torchvision's ResNet, with weights from a file and predictions for images."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image

from resnet_in1k.augment.normalize import normalize
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.decode import decode
from resnet_in1k.model import foreign
from resnet_in1k.model.resolve import DEFAULT_PREPROCESSING, resolve_checkpoint
from resnet_in1k.model.state_dict import LAYOUTS, read_resnet
from resnet_in1k.model.weights import WEIGHTS_NAME, weights_file, weights_to_save, write_tensors
from resnet_in1k.recipes.recipe import Architecture, PublishedWeights
from resnet_in1k.utils import files
from resnet_in1k.utils.device import reproducible_float32
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import human_names


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
    def from_pretrained(
        cls, checkpoint: str | Path, *, weights: PublishedWeights | None = None, **client_options: Any
    ) -> "ResNet":
        """Load weights, class names and preprocessing, strictly, in eval mode. No pickle is executed.

        Args:
            checkpoint: a run folder, checkpoint folder or file; USER/NAME on the Hub; or `torchvision/MODEL.WEIGHTS`.
            weights: "ema" for averages, if the file or checkpoint folder has both.
            client_options: `revision`, `token`, `cache_dir` … of huggingface_hub's snapshot_download.

        Raises:
            UserError: if there are no weights of a ResNet, or the repository cannot be downloaded.
        """
        found = resolve_checkpoint(checkpoint, weights, **client_options)
        model, names = load_model(found.file, found.wanted), found.class_names
        model.class_names = human_names(names) if names and len(names) == model.num_outputs else None
        model.preprocessing = found.preprocessing
        return model.eval()

    @files.user_errors()
    def save_pretrained(self, folder: str | Path, *, repo_id: str = "USER/NAME", license: str = "") -> None:
        """Write weights, class names, preprocessing, and a card with examples for this `repo_id` and license."""
        folder, tag = Path(folder), repo_id.rpartition("/")[2]
        folder.mkdir(parents=True, exist_ok=True)
        names = self.class_names or [f"class {number}" for number in range(self.num_outputs)]
        config = foreign.make_config(self.architecture, names, self.preprocessing, tag, license)
        record = {"repo_id": repo_id, "architecture": self.architecture, "license": license}
        values = {"record": record, "result": {**vars(self.preprocessing), "class_names": names}}
        card = card_environment().get_template("saved_card.md.jinja").render(values, project="resnet-in1k")
        files.write_atomically(folder / WEIGHTS_NAME, lambda path: write_tensors(weights_to_save(self), path))
        files.write_json(folder / foreign.CONFIG_NAME, config)
        files.write_text(folder / "README.md", card)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, license: str = "", **options: Any
    ) -> str:
        """Publish what `save_pretrained` writes as USER/NAME, and return the address of the commit. `options` are those
        of huggingface_hub's upload_folder, such as `revision`; `scripts/push_to_hub.py` publishes a run's results, too.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id=repo_id, license=license)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url

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


def card_environment() -> Any:
    """Return the environment of the templates of cards; `use.md.jinja`, the examples, may be included."""
    import jinja2  # not needed for predictions

    how = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **how)


def load_model(checkpoint: Path, wanted: PublishedWeights | None = None) -> ResNet:
    """Load a model; the tensors decide the architecture and the number of classes. Raises UserError if there are no
    weights, not the wanted ones or averages, or not those of a torchvision ResNet with its last layer."""
    file = weights_file(checkpoint)
    architecture, state = read_resnet(file, wanted)
    if "fc.bias" not in state:
        problem = "has no last layer, fc.weight and fc.bias of one linear layer, for logits"
        raise UserError(f"{file} {problem}; train one: train.py --init-from takes the other layers")
    model = ResNet(architecture, num_classes=len(state["fc.bias"]))
    model.load_state_dict(state)
    return model
