"""recipe.json: the recipe of a run, its data, and what it runs on."""

import dataclasses
import difflib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resnet_in1k.data.dataset import Source
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError

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
