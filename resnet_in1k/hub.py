"""Run folder to hub folder: everything is checked first, and what is published loads everywhere.

`RUN/hub/` holds model.safetensors, config.json, README.md (the card), eval.json, .eval_results/, and of a run of this
project recipe.json and curves.png. timm and transformers read config.json, torchvision the weights alone.
"""

import json
import math
import operator
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml

from resnet_in1k import files
from resnet_in1k.augment import IMAGENET_MEAN, IMAGENET_STD
from resnet_in1k.card import Evidence, data_name, make_card
from resnet_in1k.errors import UserError
from resnet_in1k.model import WEIGHTS_NAME, ResNet, load_model
from resnet_in1k.names import human_names
from resnet_in1k.recipes import Recipe
from resnet_in1k.run_folder import RECIPE_NAME, RunFolder, read_recipe

_LICENSE_NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c
ms-pl mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl unknown
"""
LICENSES = frozenset(_LICENSE_NAMES.split())
"""What the Hub takes as `license` without more beside it, https://huggingface.co/docs/hub/repositories-licenses."""


def build_hub_folder(run: RunFolder, repo_id: str, license: str = "apache-2.0") -> Path:
    """Check all that a run has left behind, and write `RUN/hub/` anew from it.

    Raises:
        UserError: if the repository id or the licence is none; if the metrics are missing, partial, not finite or of
            other weights; if the weights do not fit, carry a prefix or are not finite; if something cannot be read or
            written.
    """
    try:
        _write_hub_folder(run, gather_evidence(run, repo_id, license))
    except OSError as error:
        raise UserError(f"{error.filename or run.path} cannot be read or written: {error.strerror or error}") from None
    except (KeyError, TypeError) as error:  # recipe.json and log.jsonl, of another version or edited by hand
        raise UserError(f"the records in {run.path} are not whole ({type(error).__name__}: {error})") from None
    return run.path / "hub"


def _write_hub_folder(run: RunFolder, evidence: Evidence) -> None:
    with files.new_folder(run.path / "hub") as folder:
        shutil.copyfile(run.weights, folder / WEIGHTS_NAME)
        if files.sha256_of(folder / WEIGHTS_NAME) != evidence.evaluation["weights_sha256"]:
            raise UserError(f"{run.weights} changed while it was copied; wait until the training is over")
        files.write_json(folder / "config.json", make_config(evidence))
        files.write_json(folder / "eval.json", {**evidence.evaluation, "data": evidence.dataset_name})
        if evidence.facts is not None:
            data = {**evidence.facts["data"], "source": data_name(evidence.facts["data"]["source"])}
            files.write_json(folder / RECIPE_NAME, {**evidence.facts, "data": data})
        if evidence.has_curves:
            shutil.copyfile(run.curves.with_suffix(".png"), folder / "curves.png")
        (folder / ".eval_results").mkdir()
        results = yaml.safe_dump(_eval_results(evidence), sort_keys=False)
        files.write_text(folder / ".eval_results" / f"{_slug(evidence.dataset_name)}.yaml", results)
        files.write_text(folder / "README.md", make_card(evidence))


def gather_evidence(run: RunFolder, repo_id: str, license: str) -> Evidence:
    """Read and check a run's weights, metrics, recipe and log; raises UserError as `build_hub_folder` does."""
    _check_names(repo_id, license)
    if not run.path.is_dir():
        raise UserError(f"--run {run.path}: no such folder; give the folder that train.py wrote")
    model = _checked_model(run)
    recipe: Recipe | None = None
    facts: dict[str, Any] | None = None
    if run.recipe.exists():
        recipe, facts = read_recipe(run)
    evaluation = _checked_evaluation(run, model, facts)
    records = run.records()
    bad = run.bad_images.read_text(encoding="utf-8").splitlines() if run.bad_images.exists() else []
    return Evidence(
        repo_id=repo_id,
        license=license,
        architecture=model.architecture,
        evaluation=evaluation,
        recipe_name=facts["recipe"]["name"] if facts else None,
        recipe=recipe,
        facts=facts,
        records=records,
        num_bad_train_images=len(bad),
        has_curves=run.curves.with_suffix(".png").exists(),
    )


def _check_names(repo_id: str, license: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id}: {str(error).splitlines()[0]}") from None
    if repo_id.count("/") != 1:
        raise UserError(f"--repo-id {repo_id}: it must say whose it is: USER/NAME")
    if license not in LICENSES:
        raise UserError(
            f"--license {license}: not an identifier that the Hub knows, such as apache-2.0, mit or cc-by-4.0"
        )


def _checked_model(run: RunFolder) -> ResNet:
    if not run.weights.is_file():
        raise UserError(f"{run.path} has no {WEIGHTS_NAME}; a run has one after its first epoch")
    try:
        with safetensors.safe_open(run.weights, framework="pt") as file:
            prefixed = [key for key in file.keys() if key.startswith(("module.", "_orig_mod."))]  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UserError(f"{run.weights} is not a whole safetensors file ({error})") from None
    if prefixed:
        raise UserError(
            f"{run.weights} has keys with a prefix ({prefixed[0]}), which nobody could load; "
            "export.py --format safetensors writes them without"
        )
    model = load_model(run.weights)
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{run.weights}: {broken[0]} is not finite; these weights have diverged")
    return model


def _checked_evaluation(run: RunFolder, model: ResNet, facts: dict[str, Any] | None) -> dict[str, Any]:
    data_flag = "" if facts is not None else " --data DATA"
    again = f"evaluate again: python scripts/evaluate.py --ckpt {run.path}{data_flag} --output {run.evaluation}"
    try:
        result = dict(json.loads(run.evaluation.read_text(encoding="utf-8")))
        contradiction = _contradiction(result, model.fc.out_features)
    except FileNotFoundError:
        raise UserError(f"{run.evaluation} is missing, so nobody knows how good the weights are; {again}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{run.evaluation} is not a whole evaluation ({reason}); {again}") from None
    if result["weights_sha256"] != files.sha256_of(run.weights):
        raise UserError(f"{run.evaluation} is of other weights: its sha256 is not that of {run.weights}; {again}")
    if contradiction:
        raise UserError(f"{run.evaluation}: {contradiction}; {again}")
    if result["split"] != "val":
        raise UserError(
            f"{run.evaluation} is of the {result['split']} split; what is published is measured on val; {again}"
        )
    if facts is not None:
        data, split = facts["data"], result["split"]
        if data["class_names"] != result["class_names"] or data[f"num_{split}_images"] != result["num_images"]:
            raise UserError(
                f"{run.evaluation} is partial or of other data: {result['num_images']:,} images, where the run's "
                f"{split} split has {data[f'num_{split}_images']:,}; {again}"
            )
    return result


def _contradiction(result: dict[str, Any], num_classes: int) -> str | None:
    """What is wrong with an evaluation's numbers, in words; raises KeyError or TypeError where one is missing."""
    total, top1, top5 = (operator.index(result[name]) for name in ("num_images", "top1_correct", "top5_correct"))
    if not all(math.isfinite(result[name]) for name in ("top1_accuracy", "top5_accuracy", "loss")):
        return "a metric is not finite"
    if not (total > 0 and 0 <= top1 <= top5 <= total):
        return f"{top1} and {top5} of {total} images cannot be right"
    if (result["top1_accuracy"], result["top5_accuracy"]) != (top1 / total, top5 / total):
        return "the accuracies are not those of the counts"
    by_class = [list(result[name]) for name in ("class_num_images", "class_top1_correct", "class_top5_correct")]
    if [sum(column) for column in by_class] != [total, top1, top5]:
        return "the classes do not add up to the whole"
    if {num_classes, result["num_classes"]} != {len(column) for column in [*by_class, result["class_names"]]}:
        return f"the weights have {num_classes} classes, and it has others"
    if min(operator.index(result[name]) for name in ("image_size", "resize_size", "top_k")) < 1:
        return "image size, resize size and k must be at least 1"
    if not all(isinstance(result[name], str) and result[name] for name in ("data", "split")):
        return "data and split must be named"
    return None


def make_config(evidence: Evidence) -> dict[str, Any]:
    """config.json as timm and transformers read it, and `ResNet.from_pretrained`, which takes what it knows."""
    size, classes = evidence.image_size, len(evidence.class_names)
    pooled = math.ceil(size / 32)
    return {
        "architecture": evidence.architecture,
        "num_classes": classes,
        "num_features": 512 if evidence.architecture in ("resnet18", "resnet34") else 2048,
        "global_pool": "avg",
        "label_names": human_names(evidence.class_names),
        "pretrained_cfg": {
            "tag": re.sub(r"[^\w]+", "_", evidence.dataset_name.lower()),
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": evidence.crop_ratio,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": classes,
            "pool_size": [pooled, pooled],
            "first_conv": "conv1",
            "classifier": "fc",
            "license": evidence.license,
        },
    }


def _eval_results(evidence: Evidence) -> list[dict[str, Any]]:
    """What the Hub shows beside a dataset, one entry a metric."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    result = evidence.evaluation
    dataset_id = evidence.dataset_id if evidence.is_imagenet else _slug(evidence.dataset_name)
    notes = (
        f"{result['num_images']} images of {result['split']}, resized to {result['resize_size']} px, "
        f"centre {evidence.image_size} px, no test-time augmentation"
    )
    return eval_result_entries_to_yaml(
        [
            EvalResultEntry(dataset_id=dataset_id, task_id=task, value=result[key], notes=notes)
            for task, key in [("top1_accuracy", "top1_accuracy"), (f"top{result['top_k']}_accuracy", "top5_accuracy")]
        ]
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data"
