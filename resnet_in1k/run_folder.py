"""The run folder: the one thing that passes between training, evaluation and publication."""

import errno
import fcntl
import json
import os
import platform
import socket
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resnet_in1k import files
from resnet_in1k.errors import UserError
from resnet_in1k.model import WEIGHTS_NAME
from resnet_in1k.recipes import Recipe
from resnet_in1k.sources import Source

RECIPE_NAME = "recipe.json"
FORMAT_VERSION = 1


class RunFolder:
    """Names and reads what lies in a run folder, and writes its records."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / RECIPE_NAME
        self.log = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.weights = path / WEIGHTS_NAME
        self.bad_images = path / "bad_images.txt"
        self.bad_val_images = path / "bad_val_images.txt"
        self.evaluation = path / "eval.json"
        self.curves = path / "curves"
        """Without its suffix: there is an .svg and a .png."""

    def check_free(self, resume: bool) -> None:
        """Raises UserError if there is a run already and it is not to be resumed, or nothing says what run it is."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output-dir {self.path} is a file, not a folder; choose another")
        if self.recipe.exists() and not resume:
            raise UserError(
                f"{self.path} already holds a run; go on with it by --resume, or choose another --output-dir"
            )
        if any(self.checkpoints.glob("step_*")) and not self.recipe.exists():
            raise UserError(
                f"{self.path} has checkpoints, but no {RECIPE_NAME} to say of what data and recipe; put that back, or "
                "choose another --output-dir"
            )

    def create(self) -> None:
        """Raises UserError if the folder cannot be made or written to."""

        def try_out() -> None:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            files.write_text(self.path / ".writable", "")
            (self.path / ".writable").unlink()

        try:
            files.twice_if_need_be(try_out)
        except OSError as error:
            raise UserError(
                f"--output-dir {self.path} cannot be written to: {error.strerror}; choose another"
            ) from None

    def nearest_existing(self) -> Path:
        """The run folder, or where it would be made."""
        return next(folder for folder in [self.path, *self.path.absolute().parents] if folder.is_dir())

    def append(self, record: dict[str, Any]) -> None:
        """Add one record to log.jsonl."""
        files.append_line(self.log, json.dumps(record, allow_nan=False))

    def records(self) -> list[dict[str, Any]]:
        """All whole records of log.jsonl; a last line cut off by a kill is not one.

        Raises:
            UserError: if it cannot be read, or a line in it is none of ours.
        """
        if not self.log.exists():
            return []
        try:
            lines = files.read_text(self.log).splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            if not all(record["step"] >= 1 and record["kind"] in ("train", "epoch") for record in records):
                raise ValueError("a record without kind or step")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.log} cannot be read ({error}); mend or remove the line") from None
        return records

    def forget_after(self, step: int, verdict_pending: bool = False) -> None:
        """Drop the records that a run resumed after `step` will write again; with its verdict, if that is pending."""
        kept = [
            record
            for record in self.records()
            if record["step"] < step or (record["step"] == step and not (verdict_pending and record["kind"] == "epoch"))
        ]
        files.write_text(self.log, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))


class RunLock:
    """This process's claim on a run folder, until it ends, however it ends.

    A record lock: the kernel drops it with the process, and children, such as loader workers, do not inherit it.

    Raises:
        UserError: if another process holds it.
    """

    def __init__(self, run: RunFolder):
        self._file = (run.path / ".lock").open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{run.path} cannot be locked ({error.strerror}); put the run folder on a file system with locks"
                ) from None
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            raise UserError(f"{run.path} is being written to by {holder}; wait for it or stop it first") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()


def describe_data(train: Source, val: Source) -> dict[str, Any]:
    """What recipe.json says of the data."""
    return {
        "source": train.name,
        "num_train_images": len(train),
        "num_val_images": len(val),
        "class_names": list(train.class_names),
        "fingerprint": {"train": train.fingerprint(), "val": val.fingerprint()},
    }


def write_recipe(run: RunFolder, name: str, recipe: Recipe, data: dict[str, Any], **facts: Any) -> None:
    files.write_json(
        run.recipe,
        {"format_version": FORMAT_VERSION, "recipe": {"name": name, **asdict(recipe)}, "data": data, **facts},
    )


def write_resumed(run: RunFolder, name: str, recipe: Recipe, session: dict[str, Any]) -> None:
    """Add to recipe.json from which step on another session goes on, where and with what; and more epochs, if so."""
    _, facts = read_recipe(run)
    files.write_json(
        run.recipe,
        {**facts, "recipe": {"name": name, **asdict(recipe)}, "resumed": [*facts.get("resumed", []), session]},
    )


def read_recipe(run: RunFolder) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and all of recipe.json.

    Raises:
        UserError: if it is missing or not one.
    """
    try:
        facts = json.loads(files.read_text(run.recipe))
        fields = {key: value for key, value in facts["recipe"].items() if key != "name"}
        return Recipe(**fields), facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.recipe} cannot be read as a run's recipe ({error})") from None


def provenance() -> dict[str, Any]:
    """What made a run: versions of the libraries, and this project's commit if it runs from a checkout."""
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


def find_run(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint folder or weights file lies in: the nearest folder upwards with a recipe.json."""
    for folder in [checkpoint, *checkpoint.resolve().parents][:4]:
        if (folder / RECIPE_NAME).is_file():
            return RunFolder(folder)
    return None
