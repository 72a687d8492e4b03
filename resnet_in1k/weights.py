"""What is known of saved weights, wherever they lie: beside a run, in a file of their own, on the Hub."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_in1k.errors import UserError
from resnet_in1k.model import WEIGHTS_NAME, weights_file
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
    """As the folders of its training data were named."""
    data: str | None
    """What it was trained on, as `--data` said it."""
    image_size: int
    eval_crop_ratio: float
    recorded_evaluation: dict[str, Any] | None
    """The eval.json beside it."""


def find_weights(checkpoint: str | Path) -> Weights:
    """`--ckpt`: a run folder, a checkpoint folder, a file, or a repository on the Hub, which is downloaded.

    Raises:
        UserError: if there are no weights, or what lies beside them cannot be read.
    """
    path = Path(checkpoint)
    if not path.exists() and _REPOSITORY.fullmatch(str(checkpoint)):
        path = _download(str(checkpoint))
    file = weights_file(path)
    recorded = _read_json(file.parent / EVALUATION_NAME)
    if (run := find_run(path)) is not None:
        recipe, facts = read_recipe(run)
        names, data = facts["data"]["class_names"], facts["data"]["source"]
        return Weights(file, names, data, recipe.image_size, recipe.eval_crop_ratio, recorded)
    config = _read_json(file.parent / CONFIG_NAME) or {}
    settings = config.get("pretrained_cfg", {})
    return Weights(
        file,
        class_names=config.get("label_names") or (recorded or {}).get("class_names"),
        data=None,
        image_size=settings.get("input_size", [3, DEFAULT_IMAGE_SIZE])[1],
        eval_crop_ratio=settings.get("crop_pct", DEFAULT_CROP_RATIO),
        recorded_evaluation=recorded,
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
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            f"{repository} is no file or folder here, and no repository that could be downloaded ({reason})"
        ) from None


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); mend or remove it") from None
