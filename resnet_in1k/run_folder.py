"""The run folder: the one thing that passes between training, evaluation and publication."""

import dataclasses
import difflib
import json
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resnet_in1k.data.dataset import Source
from resnet_in1k.model.weights import WEIGHTS_NAME
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError

RECIPE_NAME = "recipe.json"
EVALUATION_NAME = "eval.json"


class RunFolder:
    """The names of what lies in a run folder, and its log."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / RECIPE_NAME
        self.log = path / "log.jsonl"
        self.lock = path / files.LOCK_NAME
        self.checkpoints = path / "checkpoints"
        self.weights = path / WEIGHTS_NAME
        self.bad_images = path / "bad_images.txt"
        self.bad_val_images = path / "bad_val_images.txt"
        self.nonfinite_batch = path / "nonfinite_batch.txt"
        self.evaluation = path / EVALUATION_NAME
        self.tracker = path / "tracker.json"
        """Where --report-to goes on when the run is resumed."""
        self.curves = path / "curves"
        """Without its suffix: there is an .svg and a .png."""

    def check_free(self, resume: bool) -> None:
        """Raises UserError if there is a run already and it is not to be resumed, or its recipe.json is missing."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output-dir {self.path} is a file, not a folder; choose another")
        if self.recipe.exists() and not resume:
            raise UserError(
                f"{self.path} already holds a run; go on with it by --resume, or choose another --output-dir"
            )
        if any(self.checkpoints.glob("step_*")) and not self.recipe.exists():
            raise UserError(
                f"{self.path} has checkpoints, but no {RECIPE_NAME} with their recipe and data; put that back, or "
                "choose another --output-dir"
            )

    def create(self) -> None:
        """Raises UserError if the folder cannot be made or written to."""

        def try_to_write() -> None:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            files.write_text(self.path / ".writable", "")
            (self.path / ".writable").unlink()

        try:
            files.retry_once(try_to_write)
        except OSError as error:
            raise UserError(
                f"--output-dir {self.path} cannot be written to: {error.strerror}; choose another"
            ) from None

    def nearest_existing(self) -> Path:
        """The run folder, or the folder in which it would be made."""
        return next(folder for folder in [self.path, *self.path.absolute().parents] if folder.is_dir())

    def append(self, record: dict[str, Any]) -> None:
        """Add one record to log.jsonl."""
        files.append_line(self.log, json.dumps(record, allow_nan=False))

    def records(self) -> list[dict[str, Any]]:
        """All whole records of log.jsonl, without a last line that was cut off by a kill.

        Raises:
            UserError: if it cannot be read, or has a line that training did not write.
        """
        if not self.log.exists():
            return []
        try:
            lines = files.read_text(self.log).splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            if not all(record["step"] >= 1 and record["kind"] in ("train", "epoch") for record in records):
                raise ValueError("a record without kind or step")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.log} cannot be read ({error}); repair or remove the line") from None
        return records

    def truncate_log(self, step: int, evaluation_pending: bool = False) -> None:
        """Drop the records that a run resumed after `step` will write again; also of its evaluation, if pending."""
        kept = [
            record
            for record in self.records()
            if record["step"] < step
            or (record["step"] == step and not (evaluation_pending and record["kind"] == "epoch"))
        ]
        files.write_text(self.log, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))


def find_run(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint folder or weights file lies in: the nearest folder upwards with a recipe.json."""
    for folder in [checkpoint, *checkpoint.resolve().parents][:4]:
        if (folder / RECIPE_NAME).is_file():
            return RunFolder(folder)
    return None


FORMAT_VERSION = 2
"""Version 1 has the same fields, but its runs drew their augmentation from one stream for all operations."""
READABLE_VERSIONS = (1, 2)


def describe_data(train: Source, val: Source, val_share: float = 0.0) -> dict[str, Any]:
    """What recipe.json says of the data."""
    return {
        "source": train.name,
        **({"val_share": val_share} if val_share else {}),
        "num_train_images": len(train),
        "num_val_images": len(val),
        "class_names": list(train.class_names),
        "fingerprint": {"train": train.fingerprint(), "val": val.fingerprint()},
    }


def write_recipe(run: RunFolder, name: str, recipe: Recipe, data: dict[str, Any], facts: dict[str, Any]) -> None:
    files.write_json(
        run.recipe,
        {"format_version": FORMAT_VERSION, "recipe": {"name": name, **asdict(recipe)}, "data": data, **facts},
    )


def add_resume(run: RunFolder, name: str, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Add to recipe.json after which step the run was resumed, and what it runs on; and more epochs, if so."""
    _, written = read_recipe(run, type(recipe))
    files.write_json(
        run.recipe,
        {**written, "recipe": {"name": name, **asdict(recipe)}, "resumed": [*written.get("resumed", []), facts]},
    )


def read_recipe(run: RunFolder, recipe_class: type[Recipe] = Recipe) -> tuple[Recipe, dict[str, Any]]:
    """As `read_recipe_file`, of a run folder."""
    return read_recipe_file(run.recipe, recipe_class)


def read_recipe_file(file: Path, recipe_class: type[Recipe] = Recipe) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and all of recipe.json. Fields that it does not have yet are switched off.

    Raises:
        UserError: if it is missing, of another format version, or not a recipe.
    """
    try:
        facts = files.read_json(file)
        version = facts["format_version"]
        fields = {key: value for key, value in facts["recipe"].items() if key != "name"}
        unknown = sorted(fields.keys() - {each.name for each in dataclasses.fields(recipe_class)})
        if version not in READABLE_VERSIONS:
            raise UserError(f"{file} has format version {version!r}, which is newer than this resnet-in1k: update it")
        if unknown:
            known = [each.name for each in dataclasses.fields(recipe_class)]
            meant = [name for field in unknown for name in difflib.get_close_matches(field, known, n=1)]
            raise UserError(
                f"{file}: recipe fields not known here: {', '.join(unknown)}; update resnet-in1k"
                + (f", or perhaps {', '.join(meant)} was meant" if meant else "")
            )
        try:
            return recipe_class(**fields), facts
        except UserError as error:  # a value that is out of its range
            raise UserError(f"{file}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} cannot be read as a run's recipe ({type(error).__name__}: {error})") from None


def provenance() -> dict[str, Any]:
    """For recipe.json; the commit is None outside a checkout."""
    packages = ("torch", "torchvision", "accelerate", "safetensors")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
