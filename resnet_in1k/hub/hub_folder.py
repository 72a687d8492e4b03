"""Check a run's results and write `RUN/hub/`, which loads in resnet-in1k, torchvision, timm and transformers.

The folder has model.safetensors, config.json, README.md (the model card) and eval.json, for a run of this project also
recipe.json and curves.png, and exported networks that were evaluated.
"""

import math
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import safetensors
import torch
from jinja2 import UndefinedError

from resnet_in1k.evaluate.statistics import different_conditions
from resnet_in1k.hub.model_card import RunRecord, make_card, published_facts
from resnet_in1k.model.exported import SUFFIXES
from resnet_in1k.model.foreign import CONFIG_NAME
from resnet_in1k.model.resnet import LAYOUTS, ResNet, load_model
from resnet_in1k.model.weights import WEIGHTS_NAME
from resnet_in1k.recipes.recipe import Interpolation, crop_ratio_for
from resnet_in1k.run_folder import EVALUATION_NAME, RECIPE_NAME, RunFolder, read_recipe
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import first_line

LICENSE_PATTERN = r"[a-z0-9][a-z0-9.+-]*"
"""Form of the Hub's identifiers; the Hub itself checks that the license exists."""


def build_hub_folder(run: RunFolder, repo_id: str, license: str = "apache-2.0") -> Path:
    """Check everything that is published, and write `RUN/hub/` in place of an earlier one.

    Raises:
        UserError: for metrics that are missing, partial, not finite or of other weights, and for broken weights.
    """
    _check_names(repo_id, license)
    try:
        record = read_run(run, repo_id, license)
        with files.replacing(run.path / "hub") as folder:
            folder.mkdir()
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
    return RunRecord(
        repo_id=repo_id,
        license=license,
        architecture=model.architecture,
        evaluation=evaluation,
        exported=_checked_exports(run, evaluation),
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
        if repo_id.count("/") != 1:
            raise HFValidationError("must have the form USER/NAME")
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id}: {first_line(error)}") from None
    if not re.fullmatch(LICENSE_PATTERN, license):
        raise UserError(f"--license {license}: not an identifier such as apache-2.0, mit or cc-by-4.0")


def _checked_model(run: RunFolder) -> ResNet:
    if not run.weights.is_file():
        raise UserError(f"{run.path} has no {WEIGHTS_NAME}; a run has one after its first epoch")
    model = load_model(run.weights)
    with safetensors.safe_open(run.weights, framework="pt") as file:
        foreign = sorted(set(file.keys()) - model.state_dict().keys())
    if foreign:
        raise UserError(
            f"{run.weights} has names of tensors that other libraries cannot load, such as {foreign[0]}; export.py "
            "--format safetensors renames them"
        )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{run.weights}: {name} is not finite; the training has diverged")
    return model


def _checked_evaluation(run: RunFolder, num_classes: int, facts: dict[str, Any] | None) -> dict[str, Any]:
    """Return eval.json if it is valid and has the run's complete validation split."""
    data_flag = "" if facts is not None else " --data DATA"
    advice = f"evaluate again: python scripts/evaluate.py --ckpt {run.path}{data_flag} --output {run.evaluation}"
    result = _read_evaluation(run.evaluation, run.weights, num_classes, advice)
    data, num_images = facts["data"] if facts is not None else {}, result["num_images"]
    if data and (data["class_names"] != result["class_names"] or data["num_val_images"] != num_images):
        expected = f"the run's val split has {data['num_val_images']:,}"
        problem = f"partial or of different data: it has {num_images:,} images, {expected}"
        raise UserError(f"{run.evaluation}: {problem}; {advice}")
    return result


def _checked_exports(run: RunFolder, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluations of exported networks; each must be of the run's weights and evaluated like the weights."""
    results = []
    for path in sorted(set(run.path.glob("*.json")) - {run.recipe, run.evaluation, run.tracker}):
        found = files.read_json_object(path) or {}
        if "exported_from" not in found:
            continue
        file, advice = run.path / str(found.get("file")), f"export and evaluate it again, or remove {path}"
        if file.name != found.get("file") or file.suffix not in SUFFIXES or not file.is_file():
            raise UserError(f"{path} is of {found.get('file')!r}, which is not in {run.path}; {advice}")
        result = _read_evaluation(path, file, evaluation["num_classes"], advice)
        problem = different_conditions(result, evaluation)
        if result["exported_from"] != evaluation["weights_sha256"]:
            problem = f"{file.name} was not exported from {run.weights}"
        if problem:
            raise UserError(f"{path}: {problem}; {advice}")
        results.append(result)
    return results


def _read_evaluation(path: Path, file: Path, num_classes: int, advice: str) -> dict[str, Any]:
    """Return an evaluation that is consistent and of this weights file; otherwise raise UserError with the advice."""
    # Earlier versions recorded no interpolation, mean and std.
    defaults = {"interpolation": "bilinear", "mean": list(imagenet.MEAN), "std": list(imagenet.STD)}
    try:
        result = {**defaults, **files.read_json(path)}
        problem = _inconsistency(result, num_classes)
        if result["weights_sha256"] != files.sha256_of(file):
            problem = f"not of {file.name}: its weights_sha256 is different"
    except FileNotFoundError:
        problem = "missing, so the accuracy is not known"
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    if result["interpolation"] not in get_args(Interpolation):
        return f"unknown interpolation {result['interpolation']!r}"
    return None if isinstance(result["data"], str) and result["data"] else "the data have no name"


def make_config(record: RunRecord) -> dict[str, Any]:
    """Return config.json for timm and transformers, and for `ResNet.from_pretrained`."""
    result = record.evaluation
    size, num_classes = result["image_size"], len(result["class_names"])
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
            "crop_pct": crop_ratio_for(size, result["resize_size"]),
            "crop_mode": "center",
            "mean": result["mean"],
            "std": result["std"],
            "num_classes": num_classes,
            "pool_size": [math.ceil(size / 32)] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
            "license": record.license,
        },
    }
