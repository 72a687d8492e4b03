"""Check a run's results and write `RUN/hub/`, which loads in resnet-in1k, torchvision, timm and transformers.

The folder has model.safetensors, config.json, README.md (the model card) and eval.json, for a run of this project also
recipe.json and curves.png, and exported networks that were evaluated.
"""

import math
import re
import shutil
from pathlib import Path
from shlex import quote
from typing import Any

import safetensors
from jinja2 import UndefinedError

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.evaluate.statistics import different_conditions
from resnet_in1k.hub.model_card import RunRecord, make_card, published_facts
from resnet_in1k.model import foreign
from resnet_in1k.model.exported import SUFFIXES
from resnet_in1k.model.foreign import CONFIG_NAME
from resnet_in1k.model.resnet import load_model
from resnet_in1k.model.resolve import DEFAULT_PREPROCESSING, resolve_checkpoint
from resnet_in1k.model.weights import WEIGHTS_NAME
from resnet_in1k.run_folder import EVALUATION_NAME, RECIPE_NAME, RunFolder, read_recipe
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.process import program


@files.user_errors()
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
                files.write_json(folder / RECIPE_NAME, record.facts)
            if (curves := run.curves.with_suffix(".png")).exists():
                shutil.copyfile(curves, folder / "curves.png")
            files.write_text(folder / "README.md", make_card(record))
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:  # a file edited by hand
        raise UserError(f"the records in {run.path} are incomplete ({type(error).__name__}: {error})") from None
    return run.path / "hub"


def _check_names(repo_id: str, license: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("must have the form USER/NAME")
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id}: {error}") from None
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):  # the Hub checks that it exists
        raise UserError(f"--license {license}: not an identifier such as apache-2.0, mit or cc-by-4.0")


def read_run(run: RunFolder, repo_id: str, license: str) -> RunRecord:
    """Read and check a run's weights, metrics, recipe and log; raises UserError like `build_hub_folder`."""
    if not run.weights.is_file():
        raise UserError(f"--run {run.path}: no {WEIGHTS_NAME} in it; a run folder has one after its first epoch")
    model = load_model(run.weights)
    with safetensors.safe_open(run.weights, framework="pt") as file:
        foreign = sorted(set(file.keys()) - model.state_dict().keys())
    if foreign:
        raise UserError(
            f"{run.weights} has names of tensors that other libraries cannot load, such as {foreign[0]}; export.py "
            "--format safetensors renames them"
        )
    recipe, facts = read_recipe(run) if run.recipe.exists() else (None, None)
    expected = {"num_classes": model.fc.out_features}
    if facts is not None:
        expected |= {"class_names": facts["data"]["class_names"], "num_images": facts["data"]["num_val_images"]}
    data = "" if facts is not None else " --data DATA"  # by default that of recipe.json
    advice = f"evaluate again: {program('evaluate')} --ckpt {quote(str(run.path))}{data}"
    advice += f" --output {quote(str(run.evaluation))}"
    weights = resolve_checkpoint(run.weights)
    if weights.recorded_evaluation is None:
        raise UserError(f"{run.evaluation} is missing, or is not of {run.weights}; {advice}")
    # Earlier versions recorded no interpolation, mean and std.
    evaluation = {**weights.recorded_evaluation, **vars(weights.preprocessing)}
    _check_evaluation(evaluation, run.evaluation, advice, expected)
    exported, published = _read_exports(run, evaluation), published_facts(facts) if facts else None
    return RunRecord(run, repo_id, license, model.architecture, evaluation, exported, recipe, published)


def _check_evaluation(result: dict[str, Any], path: Path, advice: str, expected: dict[str, Any]) -> None:
    """Raise UserError if an evaluation has other values than expected, or its counts do not add up."""
    with files.content_errors(path):
        total, top1, top5 = (sum(result[f"class_{name}"]) for name in ("num_images", "top1_correct", "top5_correct"))
        derived = {"split": "val", "num_classes": len(result["class_names"]), "num_images": total}
        derived |= {"top1_correct": top1, "top1_accuracy": top1 / total}
        derived |= {"top5_correct": top5, "top5_accuracy": top5 / total}
        wrong = [pair for pair in (*derived.items(), *expected.items()) if result[pair[0]] != pair[1]]
        problems = [f"{name} is {result[name]!r:.70}, not {value!r:.70}" for name, value in wrong]
        if not math.isfinite(result["loss"]):
            problems.append("the loss is not finite")
    if result["num_classes"] == 1:
        raise UserError(f"{path}: one class only, for which any network is right; train on at least two classes")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; {advice}")


def _read_exports(run: RunFolder, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluations of exported networks; each must be of the run's weights and evaluated like the weights."""
    results = []
    for path in sorted(set(run.path.glob("*.json")) - {run.recipe, run.evaluation, run.tracker}):
        result = files.read_json_object(path) or {}
        if "exported_from" not in result:
            continue
        file, advice = run.path / str(result.get("file")), f"export and evaluate it again, or remove {path}"
        if file.name != result.get("file") or file.suffix not in SUFFIXES or not file.is_file():
            raise UserError(f"{path} is of {result.get('file')!r}, which is not in {run.path}; {advice}")
        expected = {"weights_sha256": files.sha256_of(file), "exported_from": evaluation["weights_sha256"]}
        _check_evaluation(result, path, advice, expected)
        if different := different_conditions(result, evaluation):
            raise UserError(f"{path}: {different}; {advice}")
        results.append(result)
    return results


def make_config(record: RunRecord) -> dict[str, Any]:
    """Return config.json for timm and transformers, and for `ResNet.from_pretrained`."""
    result, tag = record.evaluation, re.sub(r"[^\w]+", "_", record.dataset_name.lower())
    preprocessing = EvalPreprocessing(**{name: result[name] for name in vars(DEFAULT_PREPROCESSING)})
    names = imagenet.human_names(result["class_names"])
    return foreign.make_config(record.architecture, names, preprocessing, tag, record.license)
