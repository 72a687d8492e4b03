"""What is known of saved weights, wherever they lie: beside a run, in a file of their own, on the Hub."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_in1k import files
from resnet_in1k.augment import IMAGENET_MEAN
from resnet_in1k.errors import UserError, first_line
from resnet_in1k.model import WEIGHTS_NAME, weights_file
from resnet_in1k.recipes import crop_ratio_for
from resnet_in1k.run_folder import RECIPE_NAME, find_run, read_recipe

CONFIG_NAME = "config.json"
EVALUATION_NAME = "eval.json"
DEFAULT_IMAGE_SIZE, DEFAULT_CROP_RATIO = 224, 0.875
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Weights:
    """A weights file, and what its surroundings say of it; None where they say nothing."""

    file: Path
    class_names: list[str] | None
    """As the folders of its training data were named; of foreign repositories, as these name them."""
    data: str | None
    """What it was trained on, as `--data` said it."""
    image_size: int
    eval_crop_ratio: float
    recorded_evaluation: dict[str, Any] | None
    """The eval.json beside it, if it is of these weights."""
    note: str
    """What a person should know before trusting them; "" if there is nothing."""


def find_weights(checkpoint: str | Path) -> Weights:
    """`--ckpt`: a run folder, a checkpoint folder, a file, or a repository on the Hub, which is downloaded.

    The size that images are brought to is that of the evaluation recorded beside the weights, if it is theirs, else
    what a published config.json says, else the run's recipe, else 224 px of 256.

    Raises:
        UserError: if there are no weights, or what lies beside them cannot be read.
    """
    path = Path(checkpoint)
    if not path.exists() and _is_repository(str(checkpoint)):
        path = _download(str(checkpoint))
    file = weights_file(path)
    recorded = _read_json(file.parent / EVALUATION_NAME)
    note = ""
    if recorded is not None and recorded.get("weights_sha256") != files.sha256_of(file):
        if file.name == WEIGHTS_NAME and "weights_sha256" in recorded:
            note = f"{file} is not what the {EVALUATION_NAME} beside it was measured on: replaced since, or damaged"
        recorded = None
    config = _read_json(file.parent / CONFIG_NAME) or {}
    settings = config.get("pretrained_cfg") or {}
    run = find_run(path)
    recipe, facts = read_recipe(run) if run is not None else (None, {})
    try:
        if settings and (settings["interpolation"], tuple(settings["mean"])) != ("bilinear", IMAGENET_MEAN):
            raise UserError(f"{file}: made for images resized or normalised otherwise than here; use timm for it")
        names = (recorded or {}).get("class_names") or facts.get("data", {}).get("class_names")
        if recorded is not None:
            image_size, resize_size = recorded["image_size"], recorded["resize_size"]
        elif settings:
            image_size, resize_size = settings["input_size"][1], None
        elif recipe is not None:
            image_size, resize_size = recipe.image_size, recipe.eval_resize_size
        else:
            image_size, resize_size = DEFAULT_IMAGE_SIZE, None
        crop_ratio = recipe.eval_crop_ratio if recipe is not None else settings.get("crop_pct", DEFAULT_CROP_RATIO)
        if resize_size is not None:
            crop_ratio = crop_ratio_for(image_size, resize_size, crop_ratio)
        source = facts["data"]["source"] if facts else None
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"what lies beside {file} is not whole ({type(error).__name__}: {error})") from None
    return Weights(file, names or config.get("label_names"), source, image_size, crop_ratio, recorded, note)


def _is_repository(checkpoint: str) -> bool:
    """Whether it can be meant so: USER/NAME, and no path of which a part is here."""
    return bool(_REPOSITORY.fullmatch(checkpoint)) and not (
        Path(checkpoint).parent.exists() or Path(checkpoint).suffix in (".pth", ".pt", ".safetensors")
    )


def _download(repository: str) -> Path:
    """The repository's weights and records, in the client's cache; never a pickle.

    Raises:
        UserError: if there is no such repository, or no way to it.
    """
    from huggingface_hub import snapshot_download

    wanted = [WEIGHTS_NAME, CONFIG_NAME, EVALUATION_NAME, RECIPE_NAME]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # the client's errors share no base, and their lines are many
        raise UserError(
            f"{repository} is no file or folder here, and no repository that could be downloaded "
            f"({first_line(error.__cause__ or error)})"
        ) from None


def _read_json(path: Path) -> dict[str, Any] | None:
    """None if there is none, or it is not whole: what it would say is then unknown."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
