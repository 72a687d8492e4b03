"""The run folder, which is all that passes between training, evaluation and publication: its files, log and
recipe.json, and when a run may be resumed."""

import dataclasses
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.validation import PRECISIONS

RECIPE_NAME = "recipe.json"
EVALUATION_NAME = "eval.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 3
"""Format of recipe.json and of the random draws of a run; see CHANGELOG.md. Only runs of this version can be
resumed."""
READABLE_VERSIONS = (1, 2, 3)
SAME_BITS = ("world_size", "gradient_accumulation_steps", "compress_gradients", "compile", "hardware", "cpu_threads")
"""Facts that must not change for a resumed run to end with the same bits."""


class RunFolder:
    """Paths of the files in a run folder, and its log."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / RECIPE_NAME
        self.log = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.weights = path / WEIGHTS_NAME
        self.evaluation = path / EVALUATION_NAME
        self.curves = path / "curves"  # without a suffix: there is an .svg and a .png
        self.bad_images = path / "bad_images.txt"
        self.bad_val_images = path / "bad_val_images.txt"
        self.nonfinite_batch = path / "nonfinite_batch.txt"
        self.tracker = path / "tracker.json"
        self.lock = path / files.LOCK_NAME

    def check_free(self, resume: bool) -> None:
        """Raise UserError if there is a run that is not to be resumed, or if recipe.json is missing."""
        if self.recipe.exists() and not resume:
            raise UserError(
                f"{self.path} already contains a run; continue it with --resume, or choose another --output-dir"
            )
        if any(self.checkpoints.glob("step_*")) and not self.recipe.exists():
            raise UserError(
                f"{self.path} has checkpoints, but no {RECIPE_NAME} with their recipe and data; restore that file, or "
                "choose another --output-dir"
            )

    def append(self, record: dict[str, Any]) -> None:
        """Append one record to log.jsonl."""
        files.append_line(self.log, json.dumps(record, allow_nan=False))

    def records(self) -> list[dict[str, Any]]:
        """Read the records of log.jsonl, without a last line that a kill has truncated."""
        if not self.log.exists():
            return []
        with files.content_errors(self.log):
            lines = files.read_text(self.log).splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            if not all(record["step"] >= 1 and record["kind"] in ("train", "epoch") for record in records):
                raise ValueError("a record without kind or step")
        return records

    def truncate_log(self, step: int, evaluation_pending: bool = False) -> None:
        """Drop the records that a run resumed after `step` will write again; also its evaluation's, if pending."""
        kept = [
            record
            for record in self.records()
            if record["step"] < step
            or (record["step"] == step and not (evaluation_pending and record["kind"] == "epoch"))
        ]
        files.write_text(self.log, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))


def find_run(checkpoint: Path) -> RunFolder | None:
    """Return the run of a checkpoint folder or weights file: the nearest folder upwards with a recipe.json."""
    for folder in [checkpoint, *checkpoint.resolve().parents][:4]:
        if (folder / RECIPE_NAME).is_file():
            return RunFolder(folder)
    return None


def write_recipe(run: RunFolder, name: str, recipe: Recipe, data: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write recipe.json; `name` is the recipe's before overrides, `facts` are about machine, versions and weights."""
    described = {"name": name, **dataclasses.asdict(recipe)}
    files.write_json(run.recipe, {"format_version": FORMAT_VERSION, "recipe": described, "data": data, **facts})


def read_recipe(run: RunFolder | Path, recipe_class: type[Recipe] = Recipe) -> tuple[Recipe, dict[str, Any]]:
    """Read the recipe, and all of recipe.json, in a run folder or a file. Fields that an older file does not have are
    disabled."""
    file = run.recipe if isinstance(run, RunFolder) else run
    with files.content_errors(file, "restore or correct it"):  # without it, the run could not be resumed
        facts = files.read_json(file)
        if (version_of_file := facts["format_version"]) not in READABLE_VERSIONS:
            raise UserError(f"{file} has format version {version_of_file!r}, newer than this resnet-in1k: update it")
        fields = {key: value for key, value in facts["recipe"].items() if key != "name"}
        if unknown := fields.keys() - {each.name for each in dataclasses.fields(recipe_class)}:
            raise UserError(f"{file}: unknown recipe fields: {', '.join(sorted(unknown))}; update resnet-in1k")
        try:
            return recipe_class(**fields), facts
        except UserError as error:  # a value that is out of its range
            raise UserError(f"{file}: {error}") from None


def check_resumable(run: RunFolder, recipe: Recipe, data: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return what will differ from an uninterrupted run, although the run may be resumed; "" for nothing.

    Raises:
        UserError: with all differences, if recipe, data or precision differ from those at the start, or if an older
            version of resnet-in1k started the run.
    """
    started_with, written = read_recipe(run, type(recipe))
    differences = started_with.differences(recipe)
    if recipe.fingerprint() == started_with.fingerprint() and recipe.epochs >= started_with.epochs:
        differences = []  # at most more epochs, on which no step depends
    with files.content_errors(run.recipe):
        if written["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{run.path} was started by an older version of resnet-in1k (commit {written.get('commit')}), which "
                "draws other random augmentation; resume it with that version, or choose another --output-dir"
            )
        if written["data"]["fingerprint"] != data["fingerprint"]:
            differences.append(f"data {written['data']['source']} → {data['source']} (other files)")
        precision, now = (PRECISIONS[entry["mixed_precision"]] for entry in (written, facts))
        if precision != now:
            differences.append(f"precision {precision} → {now}")
    if differences:
        raise UserError(
            f"{run.path} was started with other settings: {'; '.join(differences)}; resume with the settings of its "
            "start, or choose another --output-dir"
        )
    before = [written, *written.get("resumed", [])][-1]
    was = {name: before.get(name, facts[name]) for name in SAME_BITS}
    changed = [f"{name} {was[name]} → {facts[name]}" for name in SAME_BITS if was[name] != facts[name]]
    from resnet_in1k.utils.device import device_type  # not at the top: --help does not need torch

    if device_type() != "cpu":  # on another device, threads of the CPU compute nothing
        changed = [each for each in changed if not each.startswith("cpu_threads ")]
    if not changed:
        return ""
    return (
        f"{'; '.join(changed)}: the same batches in the same order, but sums are rounded differently, and each part of "
        "a batch has norm statistics of its own; bits will differ from those of an uninterrupted run"
    )


def provenance() -> dict[str, Any]:
    """Return the versions of the libraries and this project's commit; None outside a checkout."""
    packages = ("torch", "torchvision", "accelerate", "safetensors")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    # With --git-dir, because an installed package may be in an environment inside the repository of another project.
    describe = ["git", "--git-dir=.git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(describe, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"versions": versions, "commit": None}
    return {"versions": versions, "commit": described.stdout.strip()}
