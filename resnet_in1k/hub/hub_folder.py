"""Check a run's results and write `RUN/hub/`, which loads in resnet-in1k, torchvision, timm and transformers.

The folder has model.safetensors, config.json, README.md (the model card) and eval.json, for a run of this project also
recipe.json and curves.png, and exported networks that were evaluated.
"""

import math
import operator
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import safetensors
import torch
from jinja2 import UndefinedError

from resnet_in1k.evaluate.statistics import different_conditions
from resnet_in1k.hub.model_card import RunRecord, make_card, published_facts
from resnet_in1k.model.exported import is_exported
from resnet_in1k.model.foreign import CONFIG_NAME
from resnet_in1k.model.resnet import LAYOUTS, ResNet, load_model
from resnet_in1k.model.weights import PREFIXES, WEIGHTS_NAME
from resnet_in1k.recipes.recipe import Interpolation
from resnet_in1k.run_folder import EVALUATION_NAME, RECIPE_NAME, RunFolder, read_recipe
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

LICENSE_PATTERN = r"[a-z0-9][a-z0-9.+-]*"
"""Form of the Hub's identifiers; the Hub checks that the license exists when it validates the card."""


def build_hub_folder(run: RunFolder, repo_id: str, license: str = "apache-2.0") -> Path:
    """Check everything that is published, and write `RUN/hub/` in place of an earlier one.

    Raises:
        UserError: if the repository id or license has the wrong form; if the metrics are missing, partial, not finite
            or of different weights; if the weights do not fit, have prefixes or are not finite; if a file cannot be
            read or written.
    """
    _check_names(repo_id, license)
    try:
        record = read_run(run, repo_id, license)
        with files.new_folder(run.path / "hub") as folder:
            shutil.copyfile(run.weights, folder / WEIGHTS_NAME)
            if files.sha256_of(folder / WEIGHTS_NAME) != record.evaluation["weights_sha256"]:
                raise UserError(f"{run.weights} changed while it was copied; wait until the training has ended")
            for evaluation in record.exported:
                shutil.copyfile(run.path / evaluation["file"], folder / evaluation["file"])
            files.write_json(folder / CONFIG_NAME, make_config(record))
            files.write_json(folder / EVALUATION_NAME, {**record.evaluation, "data": record.dataset_name})
            if record.facts is not None:
                files.write_json(folder / RECIPE_NAME, published_facts(record.facts))
            if record.has_curves:
                shutil.copyfile(run.curves.with_suffix(".png"), folder / "curves.png")
            files.write_text(folder / "README.md", make_card(record))
    except OSError as error:
        raise UserError(f"{error.filename or run.path} cannot be read or written: {error.strerror or error}") from None
    except (KeyError, TypeError, AttributeError, UndefinedError) as error:  # recipe.json or log.jsonl, edited by hand
        raise UserError(f"the records in {run.path} are incomplete ({type(error).__name__}: {error})") from None
    return run.path / "hub"


def read_run(run: RunFolder, repo_id: str, license: str) -> RunRecord:
    """Read and check a run's weights, metrics, recipe and log; raises UserError like `build_hub_folder`."""
    if not run.path.is_dir():
        raise UserError(f"--run {run.path}: no such folder; give the folder that train.py wrote")
    model = _checked_model(run)
    recipe, facts = read_recipe(run) if run.recipe.exists() else (None, None)
    evaluation = _checked_evaluation(run, model.fc.out_features, facts)
    candidates = set(run.path.glob("*.json")) - {run.recipe, run.evaluation, run.tracker}
    results = [(path, files.read_json_object(path)) for path in sorted(candidates)]
    return RunRecord(
        repo_id=repo_id,
        license=license,
        architecture=model.architecture,
        evaluation=evaluation,
        exported=[_checked_export(run, *each, evaluation) for each in results if "exported_from" in (each[1] or {})],
        recipe=recipe,
        facts=facts,
        records=run.records(),
        num_bad_train_images=len(files.read_text(run.bad_images).splitlines()) if run.bad_images.exists() else 0,
        has_curves=run.curves.with_suffix(".png").exists(),
    )


def _check_names(repo_id: str, license: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id}: {first_line(error)}") from None
    if repo_id.count("/") != 1:
        raise UserError(f"--repo-id {repo_id}: must have the form USER/NAME")
    if not re.fullmatch(LICENSE_PATTERN, license):
        raise UserError(f"--license {license}: not an identifier such as apache-2.0, mit or cc-by-4.0")


def _checked_model(run: RunFolder) -> ResNet:
    if not run.weights.is_file():
        raise UserError(f"{run.path} has no {WEIGHTS_NAME}; a run has one after its first epoch")
    model = load_model(run.weights)
    with safetensors.safe_open(run.weights, framework="pt") as file:
        prefixed = [key for key in file.keys() if key.startswith(PREFIXES)]  # noqa: SIM118
    if prefixed:
        raise UserError(
            f"{run.weights} has keys with a prefix ({prefixed[0]}), which other libraries cannot load; "
            "export.py --format safetensors removes the prefix"
        )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{run.weights}: {name} is not finite; the training has diverged")
    return model


def _checked_evaluation(run: RunFolder, num_classes: int, facts: dict[str, Any] | None) -> dict[str, Any]:
    """Return eval.json if it is consistent, of these weights, and of the complete validation split."""
    data_flag = "" if facts is not None else " --data DATA"
    advice = f"evaluate again: python scripts/evaluate.py --ckpt {run.path}{data_flag} --output {run.evaluation}"
    try:
        # Earlier versions recorded no interpolation, mean and std.
        recorded = {"interpolation": "bilinear", "mean": list(imagenet.MEAN), "std": list(imagenet.STD)}
        result = {**recorded, **files.read_json(run.evaluation)}
        problem = _inconsistency(result, num_classes)
        if result["weights_sha256"] != files.sha256_of(run.weights):
            problem = f"of different weights: its sha256 is not that of {run.weights}"
    except FileNotFoundError:
        raise UserError(f"{run.evaluation} is missing, so the accuracy is not known; {advice}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{run.evaluation} is not a complete evaluation ({reason}); {advice}") from None
    if facts is not None and problem is None:
        data, num_images = facts["data"], result["num_images"]
        if data["class_names"] != result["class_names"] or data["num_val_images"] != num_images:
            expected = f"the run's val split has {data['num_val_images']:,}"
            problem = f"partial or of different data: it has {num_images:,} images, {expected}"
    if problem:
        raise UserError(f"{run.evaluation}: {problem}; {advice}")
    return result


def _checked_export(run: RunFolder, path: Path, result: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """Return the evaluation of an exported network if it was made from the run's weights and evaluated like them."""
    file, advice = run.path / str(result.get("file")), f"export and evaluate it again, or remove {path}"
    if file.name != result.get("file") or not is_exported(file) or not file.is_file():
        raise UserError(f"{path} is of {result.get('file')!r}, which is not in {run.path}; {advice}")
    try:
        problem = _inconsistency(result, weights["num_classes"]) or different_conditions(result, weights)
        if result["exported_from"] != weights["weights_sha256"]:
            problem = f"{file.name} was not exported from {run.weights}"
        if result["weights_sha256"] != files.sha256_of(file):
            problem = f"{file.name} has changed since"
    except (KeyError, TypeError, ValueError) as error:
        problem = f"not a complete evaluation ({type(error).__name__}: {error})"
    if problem:
        raise UserError(f"{path}: {problem}; {advice}")
    return result


def _inconsistency(result: dict[str, Any], num_classes: int) -> str | None:
    """Return what is wrong with an evaluation, None for nothing; raises KeyError or TypeError if a value is missing."""
    columns = [list(result[name]) for name in ("class_num_images", "class_top1_correct", "class_top5_correct")]
    total, top1, top5 = (sum(column) for column in columns)
    expected = {"split": "val", "num_classes": num_classes, "num_images": total, "top1_correct": top1}
    expected |= {"top5_correct": top5, "top1_accuracy": top1 / max(total, 1), "top5_accuracy": top5 / max(total, 1)}
    for name, value in expected.items():
        if result[name] != value:
            return f"{name} is {result[name]!r:.40}, not {value!r}"
    if not all(0 <= first <= fifth <= images for images, first, fifth in zip(*columns, strict=True)) or total < 1:
        return "impossible counts of the classes"
    if not math.isfinite(result["loss"]):
        return "the loss is not finite"
    if {len(columns[0]), len(result["class_names"])} != {num_classes}:
        return f"the weights have {num_classes} classes, but {len(result['class_names'])} are named"
    if min(operator.index(result[name]) for name in ("image_size", "resize_size", "top_k")) < 1:
        return "image size, resize size and top_k must be at least 1"
    if result.get("interpolation", "bilinear") not in get_args(Interpolation):
        return f"unknown interpolation {result['interpolation']!r}"
    return None if isinstance(result["data"], str) and result["data"] else "the data have no name"


def make_config(record: RunRecord) -> dict[str, Any]:
    """Return config.json for timm and transformers, and for `ResNet.from_pretrained`."""
    result = record.evaluation
    size, num_classes = result["image_size"], len(result["class_names"])
    pool_size = math.ceil(size / 32)
    return {
        "architecture": record.architecture,
        "num_classes": num_classes,
        "num_features": 512 * LAYOUTS[record.architecture][0].expansion,
        "global_pool": "avg",
        "label_names": imagenet.human_names(result["class_names"]),
        "pretrained_cfg": {
            "tag": re.sub(r"[^\w]+", "_", record.dataset_name.lower()),
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": result["interpolation"],
            "crop_pct": record.crop_ratio,
            "crop_mode": "center",
            "mean": result["mean"],
            "std": result["std"],
            "num_classes": num_classes,
            "pool_size": [pool_size, pool_size],
            "first_conv": "conv1",
            "classifier": "fc",
            "license": record.license,
        },
    }
