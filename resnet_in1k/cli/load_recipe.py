"""Load the recipe that `--recipe` names: a published one, or that of a run, by folder, recipe.json or repository."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resnet_in1k.data.registry import SOURCES
from resnet_in1k.model.resolve import REPOSITORY, download
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
    """A recipe and, if it was read from a run, that run's records."""

    name: str
    """Name in recipe.json and on the model card."""
    named: NamedRecipe
    origin: str = ""
    """The run, as `--recipe` named it; "" for a recipe by name."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The run's recipe.json."""
    evaluation: dict[str, Any] | None = None
    """The run's eval.json, if there is one."""

    @property
    def options(self) -> dict[str, Any]:
        """Default values of TrainOptions, from the run as far as they apply to another machine."""
        if not self.facts:
            return {"data": self.named.default_data}
        is_local = not self.origin.startswith(HUB)
        data, initial = self.facts["data"], self.facts.get("init_from") or {}
        source, precision = data["source"], PRECISIONS.get(self.facts.get("mixed_precision", ""))
        name = self.origin.rpartition("/")[2]
        if is_local:
            path = Path(self.origin.removesuffix(RECIPE_NAME)).resolve()
            name = path.stem if path.suffix == ".json" else path.name
        return {
            # A path in a downloaded recipe.json could name any folder of this machine.
            "data": source if is_local or source in SOURCES else self.named.default_data,
            "val_share": float(data.get("val_share", 0.0)),
            "init_from": initial.get("origin") or (initial.get("checkpoint") if is_local else None),
            "output_dir": Path("runs", f"{name}-reproduced"),
            "precision": precision.flag if precision else "auto",
            "compress_gradients": self.facts.get("compress_gradients") is True,
        }

    def differences(self, recipe: Recipe, facts: dict[str, Any]) -> list[str]:
        """Differences of another run's recipe and recipe.json from this run's, one text each."""
        lines = self.named.recipe.differences(recipe)
        data, others = (each.get("data", {}).get("fingerprint", {}).get("train") for each in (self.facts, facts))
        weights, other_weights = ((each.get("init_from") or {}).get("sha256") for each in (self.facts, facts))
        lines += ["other training images"] * (data != others) + ["other initial weights"] * (weights != other_weights)
        for name in ("mixed_precision", "world_size", "gradient_accumulation_steps"):
            if self.facts.get(name) != facts.get(name):
                lines.append(f"{name} {self.facts.get(name)} → {facts.get(name)}")
        return lines


def find_recipe(given: str) -> GivenRecipe:
    """Load a recipe by its name, from a run folder or recipe.json, or from `hub:USER/NAME`.

    Raises:
        UserError: if there is no such recipe, or it cannot be read.
    """
    path = Path(given)
    if given in RECIPES:
        return GivenRecipe(given, RECIPES[given])
    if given.startswith(HUB):
        repository = given.removeprefix(HUB)
        if not REPOSITORY.fullmatch(repository):
            raise UserError(f"--recipe {given}: {repository!r} is not a repository; give hub:USER/NAME")
        file = download(repository, names=(RECIPE_NAME, EVALUATION_NAME)) / RECIPE_NAME
        if not file.is_file():
            raise UserError(f"--recipe {given}: it has no {RECIPE_NAME}, so its training is not published")
    elif path.suffix == ".json" or path.is_dir() or len(path.parts) > 1:
        file = path / RECIPE_NAME if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"--recipe {given}: no {file}; give a run folder, its {RECIPE_NAME}, or hub:USER/NAME")
    else:
        lookup(RECIPES, given, "recipe")  # raises UserError with the nearest name
    recipe, facts = read_recipe_file(file)
    try:
        name = facts["recipe"]["name"]
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"recipe name {name!r:.40}")
        parts = facts["world_size"] * facts["gradient_accumulation_steps"]
        named = replace(
            RECIPES.get(name, NamedRecipe(recipe, source=given)),
            recipe=recipe,
            # Norm statistics are of a forward pass: on fewer processes it must have as many images.
            images_per_forward_pass=-(-recipe.global_batch_size // parts),
        )
        found = GivenRecipe(name, named, given, facts, files.read_json_object(file.with_name(EVALUATION_NAME)))
        _ = found.options, found.differences(recipe, facts)  # raise here, not after hours of training
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"--recipe {given}: {file} is incomplete ({type(error).__name__}: {error})") from None
    return found
