"""Resolve `--ckpt` to a weights file and its metadata: in a run folder, in a file, on the Hub or from torchvision."""

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.data.registry import SOURCES
from resnet_in1k.model import foreign
from resnet_in1k.model.exported import SUFFIXES, ExportedNetwork, load_exported
from resnet_in1k.model.weights import EMA_NAME, PICKLE_NAME, WEIGHTS_NAME, sha256_of_weights, weights_file
from resnet_in1k.recipes.recipe import Interpolation, PublishedWeights
from resnet_in1k.run_folder import EVALUATION_NAME, RECIPE_NAME, RunFolder, find_run, read_recipe
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import file_size, first_line, printable
from resnet_in1k.utils.process import rank

DEFAULT_PREPROCESSING = EvalPreprocessing(image_size=224, resize_size=256)
MAX_IMAGE_SIZE, MAX_RESIZE_RATIO = 4096, 10
"""An image of that size takes 1 GB in a ResNet-50; larger ones could exhaust the memory of any machine."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""USER/NAME on the Hub."""
JSON_NAMES = (foreign.CONFIG_NAME, foreign.PREPROCESSOR_NAME, EVALUATION_NAME, RECIPE_NAME)
MAX_BYTES = {WEIGHTS_NAME: 10**9, PICKLE_NAME: 10**9, **dict.fromkeys(JSON_NAMES, 10**7)}
"""Largest size of each file that is downloaded; the weights of a ResNet-152 have 0.24 GB."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A weights file with its preprocessing, class names and other metadata."""

    file: Path
    origin: str
    """USER/NAME on the Hub or torchvision/MODEL.WEIGHTS; "" for a file of this machine."""
    exported: ExportedNetwork | None
    """The network, if the file is one that was exported."""
    preprocessing: EvalPreprocessing
    class_names: list[str] | None
    kind: PublishedWeights
    """The model's own weights, or their moving average."""
    wanted: PublishedWeights | None
    """The one to take from the file; None if the file is known to have this kind, or for any."""
    data: str | None
    """Training data, as `--data` named them; None if not recorded."""
    val_share: float
    """Share of the images that the run held out for validation; 0 if the data have a val split."""
    recorded_evaluation: dict[str, Any] | None
    """eval.json in the same folder, if it is of these weights or, for an exported network, of the original ones."""


def resolve_checkpoint(checkpoint: str | Path, wanted: PublishedWeights | None = None, **client: Any) -> Weights:
    """Find the weights that `--ckpt` names and the files that describe them; `client` is from_pretrained's.

    Raises UserError if there are no weights, or not the wanted ones, they cannot be downloaded, or the files with them
    cannot be read or have values that cannot be used: they may come from anywhere.
    """
    path, name, origin, published = Path(checkpoint), str(checkpoint), "", {}
    if not path.exists() and name.startswith(foreign.TORCHVISION):
        origin, (path, published) = name, foreign.download_torchvision_weights(name)
    elif not path.exists() and _is_repository(name):
        origin, path = name, download(name, **client)
    file = weights_file(path, wanted)
    exported = load_exported(file) if file.suffix in SUFFIXES else None
    of_run = _read_run(run, file) if (run := find_run(path)) else {}
    evaluation = _evaluation_of(file, exported) or {}
    # Other files may have both kinds, so that eval.json may be of either.
    records = exported.facts if exported else (evaluation if file.suffix == ".safetensors" else {}) | of_run
    known = "ema" if file.name == EMA_NAME else records.get("weights")
    if wanted and wanted != known and (known or exported):
        name = EMA_NAME if wanted == "ema" else WEIGHTS_NAME
        folders = sorted(each.parent for each in run.checkpoints.glob(f"step_*/{name}")) if run else []
        advice = f"give one of the run's checkpoint folders, such as {folders[-1]}" if folders else "omit the flag"
        raise UserError(f"--weights {wanted}: {file} has the other ones; {advice}")
    kind: PublishedWeights = "ema" if (known or wanted) == "ema" else "model"
    evaluation = evaluation if evaluation.get("weights", kind) == kind else {}
    recorded = [  # each takes precedence over those before it
        (run.recipe if run else file, of_run),
        (file.parent / foreign.CONFIG_NAME, published or foreign.read_config(file.parent)),
        (file if exported else file.parent / EVALUATION_NAME, exported.facts if exported else evaluation),
    ]
    found, class_names = vars(DEFAULT_PREPROCESSING), None
    for where, values in recorded:
        with files.content_errors(where):
            found = _checked({name: values.get(name, found[name]) for name in found})
            class_names = _checked_names(values.get("class_names")) or class_names
    data = of_run.get("data")
    return Weights(
        file=file,
        origin=origin,
        exported=exported,
        preprocessing=EvalPreprocessing(**found),
        class_names=class_names,
        kind=kind,
        wanted=None if known else wanted,
        # A path in a downloaded recipe.json could name any folder of this machine.
        data=data if not origin or data in SOURCES else None,
        val_share=of_run.get("val_share", 0.0),
        recorded_evaluation=evaluation or None,
    )


def _read_run(run: RunFolder, file: Path) -> dict[str, Any]:
    """Return what recipe.json records of the weights, by the names of eval.json, and `data` and `val_share`."""
    recipe, facts = read_recipe(run)
    with files.content_errors(run.recipe):
        data = facts["data"]
        if not isinstance(data.get("source"), str | None):
            raise ValueError("its data have no name")
        found = {"data": data.get("source"), "val_share": float(data.get("val_share", 0.0))}
        found |= {"class_names": data.get("class_names"), **vars(EvalPreprocessing.from_recipe(recipe))}
        return found | ({"weights": recipe.publish} if file.resolve() == run.weights.resolve() else {})


def _evaluation_of(file: Path, exported: ExportedNetwork | None) -> dict[str, Any] | None:
    """Return eval.json of the file's folder if it was measured on these weights; warn if a run's was not."""
    evaluation = files.read_json_object(file.parent / EVALUATION_NAME) or {}
    if "weights_sha256" not in evaluation:
        return None
    if evaluation["weights_sha256"] == (exported.facts.get("exported_from") if exported else sha256_of_weights(file)):
        return evaluation
    if file.name == WEIGHTS_NAME and rank() == 0:
        problem = f"is not the file that {EVALUATION_NAME} was measured on: it was replaced or is damaged"
        logging.getLogger(__name__).warning("%s %s", file, problem)
    return None


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of EvalPreprocessing; raises ValueError or TypeError for values that cannot be used."""
    size, resize_size, interpolation = found["image_size"], found["resize_size"], found["interpolation"]
    is_possible = type(size) is type(resize_size) is int and 1 <= size <= min(resize_size, MAX_IMAGE_SIZE)
    if not is_possible or resize_size > MAX_RESIZE_RATIO * size:
        raise ValueError(f"a crop of {size!r:.40} px from images resized to {resize_size!r:.40} px")
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"images resized by {interpolation!r:.40}, which is not bilinear or bicubic")
    mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))  # JSON has lists
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"mean {found['mean']!r:.60}, std {found['std']!r:.60}")
    return {**found, "mean": mean, "std": std}


def _checked_names(names: Any) -> list[str]:
    if not isinstance(names or [], list) or not all(isinstance(name, str) for name in names or []):
        raise ValueError("its class names are not a list of texts")
    return [printable(name) for name in names or []]


def _is_repository(checkpoint: str) -> bool:
    """True for USER/NAME, unless the first part is a folder here or the name ends like a weights file."""
    path = Path(checkpoint)
    is_file_name = path.suffix in (".pth", ".pt", ".safetensors", ".onnx", ".pt2")
    return bool(REPOSITORY.fullmatch(checkpoint)) and not is_file_name and not path.parent.exists()


def download(
    repository: str, *, revision: str | None = None, names: Iterable[str] = tuple(MAX_BYTES), **client_options: Any
) -> Path:
    """Download those of the named files that USER/NAME has; a pickle only if there is no safetensors file.

    Raises UserError if there is no such repository, it cannot be reached, or a file is larger than MAX_BYTES.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # the error below contains what the client would log about its retries
    wanted, sizes, reason = set(names), {}, None
    try:
        tree = HfApi(token=client_options.get("token")).list_repo_tree(repository, revision=revision)
        sizes = {each.path: each.size for each in tree if hasattr(each, "size")}
    except Exception as error:  # the client's errors have no common base class
        reason = error
        client_options["local_files_only"] = True  # files of unknown size are only taken from the cache
    if WEIGHTS_NAME in sizes:
        wanted.discard(PICKLE_NAME)
    for name in wanted & sizes.keys():
        if sizes[name] > MAX_BYTES[name]:
            raise UserError(
                f"{repository}: {name} has {file_size(sizes[name])}, more than the limit of "
                f"{file_size(MAX_BYTES[name])}; if you trust it, download it yourself and give its path"
            )
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=sorted(wanted), **client_options))
    except Exception as error:
        reason = reason or error
        raise UserError(
            f"{repository} is not a file or folder here, and no such repository could be downloaded "
            f"({first_line(reason.__cause__ or reason)})"
        ) from None
