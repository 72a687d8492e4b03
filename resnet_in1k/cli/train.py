"""Train a ResNet by a named recipe, or by the recipe of a run."""

import math
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from resnet_in1k.cli.arguments import parse_given
from resnet_in1k.cli.compare import differences
from resnet_in1k.cli.train_options import DEFAULT_RECIPE, Arguments
from resnet_in1k.data.registry import SOURCES
from resnet_in1k.evaluate.statistics import describe_distance, distance
from resnet_in1k.model.resolve import REPOSITORY, download
from resnet_in1k.recipes.published import RECIPES, NamedRecipe
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import accumulation_steps, scaled
from resnet_in1k.run_folder import EVALUATION_NAME, RECIPE_NAME, RunFolder, read_recipe
from resnet_in1k.train.loop import train
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.process import program, rank, world_size
from resnet_in1k.utils.validation import PRECISION_FLAGS, lookup

HUB = "hub:"


@dataclass(frozen=True)
class GivenRecipe:
    """A recipe and, if it was read from a run, that run's records."""

    name: str
    """Name in recipe.json and on the model card."""
    named: NamedRecipe
    options: dict[str, Any]
    """Default values of TrainOptions."""
    origin: str = ""
    """The run, as `--recipe` named it; "" for a recipe by name."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The run's recipe.json."""
    evaluation: dict[str, Any] | None = None
    """The run's eval.json, if there is one."""


def find_recipe(given: str) -> GivenRecipe:
    """Load a recipe by its name, from a run folder or recipe.json, or from `hub:USER/NAME`; UserError if that fails."""
    path = Path(given)
    if given.startswith(HUB):
        repository = given.removeprefix(HUB)
        if not REPOSITORY.fullmatch(repository):
            raise UserError(f"--recipe {given}: {repository!r} is not a repository; give hub:USER/NAME")
        path = download(repository, names=(RECIPE_NAME, EVALUATION_NAME))
    elif given in RECIPES or not (path.suffix == ".json" or path.is_dir() or len(path.parts) > 1):
        named = lookup(RECIPES, given, "recipe")
        return GivenRecipe(given, named, {"data": named.default_data})
    file = path / RECIPE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--recipe {given}: it has no {RECIPE_NAME}; give a run folder, hub:USER/NAME or such a file")
    recipe, facts = read_recipe(file)
    with files.content_errors(file):
        name = facts["recipe"]["name"]
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"recipe name {name!r:.40}")
        # Batch norm depends on the images per forward pass: keep their number on fewer processes.
        images = math.ceil(recipe.global_batch_size / (facts["world_size"] * facts["gradient_accumulation_steps"]))
        named = NamedRecipe(
            recipe, source=given, images_per_forward_pass=images, needs_weights=facts.get("init_from") is not None
        )
        evaluation = files.read_json_object(file.with_name(EVALUATION_NAME))
        return GivenRecipe(name, named, _options_like(given, file, facts), given, facts, evaluation)


def _options_like(given: str, file: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the default values of TrainOptions for another run like that one, which may be of another machine."""
    is_local = not given.startswith(HUB)
    data, initial, teacher = facts["data"], facts.get("init_from") or {}, facts.get("teacher") or {}
    folder = file.resolve().parent if is_local else Path(given)
    name = folder.name if file.name == RECIPE_NAME else file.stem
    options = {
        "val_share": float(data.get("val_share", 0.0)),
        "init_from": initial.get("origin") or (initial.get("checkpoint") if is_local else None),
        "teacher": teacher.get("origin") or (teacher.get("checkpoint") if is_local else None),
        "weights": "ema" if initial.get("weights") == "ema" else None,
        "output_dir": Path("runs", f"{name}-reproduced"),
        "precision": PRECISION_FLAGS.get(facts.get("mixed_precision"), "auto"),
        "compress_gradients": facts.get("compress_gradients") is True,
    }
    # A path in a downloaded recipe.json could name any folder of this machine.
    return options | ({"data": data["source"]} if is_local or data["source"] in SOURCES else {})


def parse_flags() -> tuple[GivenRecipe, Arguments]:
    """Parse the command line; what is not given is as in the recipe, scaled to the sizes that are given.

    Raises:
        UserError: for wrong flags, if there is no such recipe, or if it needs weights to start from and none are given.
    """
    values = parse_given(Arguments)
    given = find_recipe(values.get("recipe", DEFAULT_RECIPE))
    name = given.origin or given.name
    recipe = scaled(given.named.recipe, **_fields_of(Recipe, values))
    accumulation = accumulation_steps(recipe.global_batch_size, world_size(), given.named.images_per_forward_pass)
    defaults = {**given.options, "gradient_accumulation_steps": accumulation}
    options = TrainOptions(**{**defaults, **_fields_of(TrainOptions, values)})
    lists_recipes = values.get("list_recipes", False)
    if given.named.needs_weights and options.init_from is None and not lists_recipes:
        raise UserError(
            f"--recipe {name} starts from trained weights: give --init-from, such as a run folder, USER/NAME on the "
            "Hub or torchvision/resnet50.IMAGENET1K_V2"
        )
    return given, Arguments(recipe=name, list_recipes=lists_recipes, options=options, fields=recipe)


def _fields_of(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    return {each.name: values[each.name] for each in fields(cls) if each.name in values}


def describe_recipes() -> str:
    """Return a table of the named recipes, with published accuracies and their sources."""
    layout = "{:<13}{:>6}  {:>7}  {:>5}  {:>7}  {:>7}  {:>9}  {:<20}  {}"
    lines = [layout.format("recipe", "epochs", "px", "batch", "top-1 %", "top-5 %", "GPU hours", "on", "measured here")]
    for name, named in RECIPES.items():
        recipe = named.recipe
        size = f"{recipe.initial_image_size}-{recipe.image_size}" if recipe.initial_image_size else recipe.image_size
        top1, top5, hardware, gpu_hours = named.published
        numbers = [f"{value:g}" if value is not None else "–" for value in (top1, top5, gpu_hours)]
        cells = (recipe.epochs, size, recipe.global_batch_size, *numbers, hardware, named.measured)
        lines.append(layout.format(name, *cells))
    lines += ["", "px: training image size. Accuracy on ImageNet-1k and GPU hours are published by:"]
    lines += [f"  {name:<13}{named.source}" for name, named in RECIPES.items()]
    lines += ["", f"To estimate a recipe on this machine:  {program('train')} --recipe NAME --data DATA --dry-run"]
    return "\n".join(lines)


def describe_outcome(given: GivenRecipe, run: RunFolder) -> str:
    """Return the comparison with the published result of the run's recipe; "" if there is none."""
    result = files.read_json_object(run.evaluation)
    if result is None:
        return ""
    recipe, facts = read_recipe(run)
    top1 = given.named.published.top1
    try:
        if given.evaluation is not None:
            text = describe_distance(result, given.evaluation, given.origin)
        elif top1 is not None and imagenet.is_of_imagenet(result, facts["data"]["num_train_images"]):
            text = f"published top-1 of {given.name} {top1:.2f}%: here {distance(result, top1)}"
        else:
            return ""
        changes = differences((given.named.recipe, given.facts or facts), (recipe, facts))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return f"the records of {given.origin} are incomplete ({type(error).__name__}: {error})"
    return text + (f"; trained with {'; '.join(changes)}" if changes else "")


def main() -> Path | None:
    given, arguments = parse_flags()
    if arguments.list_recipes:
        print(describe_recipes())
        return None
    folder = train(given.name, arguments.fields, arguments.options, command=sys.argv)
    if not arguments.options.dry_run and rank() == 0 and (outcome := describe_outcome(given, RunFolder(folder))):
        print(outcome)
    return folder
