"""Run folder to hub folder: everything is checked first, and the result loads everywhere.

`RUN/hub/` holds model.safetensors, config.json, README.md (the model card), eval.json and, for a run of this project,
recipe.json and curves.png. timm and transformers read config.json; torchvision needs the weights only.
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

from resnet_in1k.data.registry import source_facts
from resnet_in1k.evaluate.statistics import different_conditions
from resnet_in1k.hub.model_card import RunRecord, make_card, published_origin
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
"""The form of the Hub's identifiers; which of them exist, the Hub says when the card is validated."""


def build_hub_folder(run: RunFolder, repo_id: str, license: str = "apache-2.0") -> Path:
    """Check everything that is published of a run, and write `RUN/hub/`, in place of an earlier one.

    Raises:
        UserError: if the repository id or the license has the wrong form; if the metrics are missing, partial, not
            finite or of other weights; if the weights do not fit, have prefixes or are not finite; if something cannot
            be read or written.
    """
    _check_names(repo_id, license)
    try:
        record = read_run(run, repo_id, license)
        with files.new_folder(run.path / "hub") as folder:
            _write(record, run, folder)
    except OSError as error:
        raise UserError(f"{error.filename or run.path} cannot be read or written: {error.strerror or error}") from None
    except (KeyError, TypeError, UndefinedError) as error:  # recipe.json or log.jsonl, edited by hand
        raise UserError(f"the records in {run.path} are incomplete ({type(error).__name__}: {error})") from None
    return run.path / "hub"


def _write(record: RunRecord, run: RunFolder, folder: Path) -> None:
    shutil.copyfile(run.weights, folder / WEIGHTS_NAME)
    if files.sha256_of(folder / WEIGHTS_NAME) != record.evaluation["weights_sha256"]:
        raise UserError(f"{run.weights} changed while it was copied; wait until the training has ended")
    for evaluation in record.exported:
        shutil.copyfile(run.path / evaluation["file"], folder / evaluation["file"])
    files.write_json(folder / CONFIG_NAME, make_config(record))
    # Published without the folders that the data and the initial weights lie in.
    files.write_json(folder / EVALUATION_NAME, {**record.evaluation, "data": record.dataset_name})
    if record.facts is not None:
        data = {**record.facts["data"], "source": source_facts(record.facts["data"]["source"]).name}
        initial = {"init_from": published_origin(record.facts)} if "init_from" in record.facts else {}
        files.write_json(folder / RECIPE_NAME, {**record.facts, "data": data, **initial})
    if record.has_curves:
        shutil.copyfile(run.curves.with_suffix(".png"), folder / "curves.png")
    files.write_text(folder / "README.md", make_card(record))


def read_run(run: RunFolder, repo_id: str, license: str) -> RunRecord:
    """Read and check a run's weights, metrics, recipe and log; raises UserError as `build_hub_folder` does."""
    if not run.path.is_dir():
        raise UserError(f"--run {run.path}: no such folder; give the folder that train.py wrote")
    model = _checked_model(run)
    recipe, facts = read_recipe(run) if run.recipe.exists() else (None, None)
    return RunRecord(
        repo_id=repo_id,
        license=license,
        architecture=model.architecture,
        evaluation=_checked_evaluation(run, model.fc.out_features, facts),
        exported=_checked_exports(run),
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
        raise UserError(f"--repo-id {repo_id}: must name its owner, too: USER/NAME")
    if not re.fullmatch(LICENSE_PATTERN, license):
        raise UserError(f"--license {license}: not an identifier such as apache-2.0, mit or cc-by-4.0")


def _checked_model(run: RunFolder) -> ResNet:
    if not run.weights.is_file():
        raise UserError(f"{run.path} has no {WEIGHTS_NAME}; a run has one after its first epoch")
    try:
        with safetensors.safe_open(run.weights, framework="pt") as file:
            prefixed = [key for key in file.keys() if key.startswith(PREFIXES)]  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UserError(f"{run.weights} is not a whole safetensors file ({error})") from None
    if prefixed:
        raise UserError(
            f"{run.weights} has keys with a prefix ({prefixed[0]}), which other libraries cannot load; "
            "export.py --format safetensors writes them without"
        )
    model = load_model(run.weights)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{run.weights}: {name} is not finite; these weights have diverged")
    return model


def _checked_evaluation(run: RunFolder, num_classes: int, facts: dict[str, Any] | None) -> dict[str, Any]:
    """eval.json, if it is of these weights, consistent, and of the whole validation split."""
    data_flag = "" if facts is not None else " --data DATA"
    advice = f"evaluate again: python scripts/evaluate.py --ckpt {run.path}{data_flag} --output {run.evaluation}"
    try:
        result = dict(files.read_json(run.evaluation))
        problem = _inconsistency(result, num_classes)
        if result["weights_sha256"] != files.sha256_of(run.weights):
            problem = f"of other weights: its sha256 is not that of {run.weights}"
    except FileNotFoundError:
        raise UserError(f"{run.evaluation} is missing, so the accuracy of the weights is not known; {advice}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{run.evaluation} is not a complete evaluation ({reason}); {advice}") from None
    if facts is not None and problem is None:
        data = facts["data"]
        if data["class_names"] != result["class_names"] or data["num_val_images"] != result["num_images"]:
            problem = (
                f"partial or of other data: {result['num_images']:,} images, where the run's val split has "
                f"{data['num_val_images']:,}"
            )
    if problem:
        raise UserError(f"{run.evaluation}: {problem}; {advice}")
    return result


def _checked_exports(run: RunFolder) -> list[dict[str, Any]]:
    """The evaluations of exported networks in the run folder, by the name of the network's file; they must be of the
    run's weights, under the conditions of their eval.json."""
    exported = {}
    for path in sorted(run.path.glob("*.json")):
        result = files.read_json_object(path) if path not in (run.recipe, run.evaluation, run.tracker) else None
        if result is None or "exported_from" not in result:
            continue
        file = run.path / str(result.get("file"))
        advice = f"export and evaluate it again, or remove {path}"
        if file.name != result.get("file") or not is_exported(file) or not file.is_file():
            raise UserError(f"{path} is of {result.get('file')!r}, which is not in {run.path}; {advice}")
        weights = files.read_json(run.evaluation)
        try:
            problem = _inconsistency(result, weights["num_classes"]) or different_conditions(result, weights)
            if result["exported_from"] != files.sha256_of(run.weights):
                problem = f"{file.name} was exported from other weights than {run.weights}"
            if result["weights_sha256"] != files.sha256_of(file):
                problem = f"{file.name} has changed since"
        except (KeyError, TypeError, ValueError) as error:
            problem = f"not a complete evaluation ({type(error).__name__}: {error})"
        if problem:
            raise UserError(f"{path}: {problem}; {advice}")
        exported[file.name] = result
    return list(exported.values())


def _inconsistency(result: dict[str, Any], num_classes: int) -> str | None:
    """What is wrong with an evaluation's values; raises KeyError or TypeError where one is missing or no number."""
    total, top1, top5 = (operator.index(result[name]) for name in ("num_images", "top1_correct", "top5_correct"))
    by_class = [list(result[name]) for name in ("class_num_images", "class_top1_correct", "class_top5_correct")]
    if not math.isfinite(result["loss"]):
        return "the loss is not finite"
    if not (total > 0 and 0 <= top1 <= top5 <= total):
        return f"impossible counts: {top1} and {top5} of {total} images"
    if (result["top1_accuracy"], result["top5_accuracy"]) != (top1 / total, top5 / total):
        return "the accuracies are not those of the counts"
    if [sum(column) for column in by_class] != [total, top1, top5]:
        return "the counts of the classes do not add up to the total"
    if {num_classes, result["num_classes"]} != {len(column) for column in [*by_class, result["class_names"]]}:
        return f"the weights have {num_classes} classes, the evaluation has others"
    if min(operator.index(result[name]) for name in ("image_size", "resize_size", "top_k")) < 1:
        return "image size, resize size and k must be at least 1"
    if result.get("interpolation", "bilinear") not in get_args(Interpolation):
        return f"unknown interpolation {result['interpolation']!r}"
    if not (isinstance(result["data"], str) and result["data"]):
        return "the data have no name"
    if result["split"] != "val":
        return f"of the {result['split']} split; what is published is measured on val"
    return None


def make_config(record: RunRecord) -> dict[str, Any]:
    """config.json, for timm and transformers, and for `ResNet.from_pretrained`, which takes its own arguments of it."""
    size, num_classes = record.image_size, len(record.class_names)
    pool_size = math.ceil(size / 32)
    return {
        "architecture": record.architecture,
        "num_classes": num_classes,
        "num_features": 512 * LAYOUTS[record.architecture][0].expansion,
        "global_pool": "avg",
        "label_names": imagenet.human_names(record.class_names),
        "pretrained_cfg": {
            "tag": re.sub(r"[^\w]+", "_", record.dataset_name.lower()),
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": record.interpolation,
            "crop_pct": record.crop_ratio,
            "crop_mode": "center",
            "mean": list(record.mean),
            "std": list(record.std),
            "num_classes": num_classes,
            "pool_size": [pool_size, pool_size],
            "first_conv": "conv1",
            "classifier": "fc",
            "license": record.license,
        },
    }
