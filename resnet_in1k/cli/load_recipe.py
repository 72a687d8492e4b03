"""`--recipe` to a recipe: one by name, or that of a run: by its folder, its recipe.json or repository on the Hub."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resnet_in1k.data.registry import SOURCES
from resnet_in1k.model.hub_files import REPOSITORY, download
from resnet_in1k.recipes.published import RECIPES, NamedRecipe
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import EVALUATION_NAME, RECIPE_NAME, read_recipe_file
from resnet_in1k.utils import files
from resnet_in1k.utils.device import PRECISIONS
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.validation import lookup

HUB = "hub:"


@dataclass(frozen=True)
class GivenRecipe:
    """A recipe, and what is known of the run that it is taken from."""

    name: str
    """As recipe.json and the model card call it."""
    named: NamedRecipe
    origin: str = ""
    """The run, as `--recipe` named it; "" for a recipe by name."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The run's recipe.json."""
    evaluation: dict[str, Any] | None = None
    """The run's eval.json, if there is one."""

    @property
    def options(self) -> dict[str, Any]:
        """Fields of TrainOptions as that run had them: what can be taken over to another machine."""
        if not self.facts:
            return {"data": self.named.default_data}
        is_here = not self.origin.startswith(HUB)
        data, initial = self.facts["data"], self.facts.get("init_from") or {}
        source, precision = data["source"], PRECISIONS.get(self.facts.get("mixed_precision", ""))
        known = is_here or source in SOURCES  # by name alone: a path is not a stranger's to choose
        return {
            "data": source if known else self.named.default_data,
            "val_share": float(data.get("val_share", 0.0)),
            "init_from": initial.get("origin") or (initial.get("checkpoint") if is_here else None),
            "output_dir": Path("runs", f"{_folder_name(self.origin)}-reproduced"),
            "precision": precision.flag if precision else "auto",
            "compress_gradients": self.facts.get("compress_gradients") is True,
        }

    def differences(self, recipe: Recipe, facts: dict[str, Any]) -> list[str]:
        """What a run with that recipe and recipe.json has not in common with the one that it reproduces, in words."""
        lines = self.named.recipe.differences(recipe)
        for name, *path in (
            ("training images", "data", "fingerprint", "train"),
            ("initial weights", "init_from", "sha256"),
        ):
            if _at(self.facts, path) != _at(facts, path):
                lines.append(f"other {name}")
        for name in ("mixed_precision", "world_size", "gradient_accumulation_steps"):
            if self.facts.get(name) != facts.get(name):
                lines.append(f"{name} {self.facts.get(name)} → {facts.get(name)}")
        return lines


def find_recipe(given: str) -> GivenRecipe:
    """A recipe by name; of a run folder or recipe.json; or `hub:USER/NAME`.

    Raises:
        UserError: if there is no such recipe, or if it cannot be read.
    """
    if given in RECIPES:
        return GivenRecipe(given, RECIPES[given])
    if given.startswith(HUB):
        repository = given.removeprefix(HUB)
        if not REPOSITORY.fullmatch(repository):
            raise UserError(f"--recipe {given}: {repository!r} is no repository; give hub:USER/NAME")
        file = download(repository, names=(RECIPE_NAME, EVALUATION_NAME)) / RECIPE_NAME
        if not file.is_file():
            raise UserError(f"--recipe {given}: no {RECIPE_NAME} there, so how it was trained is not published")
    elif (path := Path(given)).suffix == ".json" or path.is_dir() or len(path.parts) > 1:
        file = path / RECIPE_NAME if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"--recipe {given}: no {file}; give a run folder, its {RECIPE_NAME}, or hub:USER/NAME")
    else:
        lookup(RECIPES, given, "recipe")
        raise AssertionError("it is in the table")
    return _of_run(given, file)


def _of_run(given: str, file: Path) -> GivenRecipe:
    recipe, facts = read_recipe_file(file)
    try:
        name = facts["recipe"]["name"]
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"recipe name {name!r:.40}")
        parts = facts["world_size"] * facts["gradient_accumulation_steps"]
        base = RECIPES.get(name, NamedRecipe(recipe, source=given))
        found = GivenRecipe(
            name,
            # Norm statistics are of a forward pass: with as many images in each, they are the same on fewer processes.
            replace(base, recipe=recipe, images_per_forward_pass=-(-recipe.global_batch_size // parts)),
            origin=given,
            facts=facts,
            evaluation=files.read_json_object(file.with_name(EVALUATION_NAME)),
        )
        _ = found.options  # that it can be read is found out here
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"--recipe {given}: {file} is incomplete ({type(error).__name__}: {error})") from None
    return found


def _at(facts: Any, path: list[str]) -> Any:
    """None where there is nothing."""
    for name in path:
        facts = facts.get(name) if isinstance(facts, dict) else None
    return facts


def _folder_name(origin: str) -> str:
    if origin.startswith(HUB):
        return origin.rpartition("/")[2]
    path = Path(origin)
    if path.suffix == ".json" and path.name != RECIPE_NAME:
        return path.stem
    return (path.parent if path.name == RECIPE_NAME else path).resolve().name
