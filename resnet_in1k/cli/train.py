"""scripts/train.py."""

from dataclasses import dataclass, replace
from pathlib import Path

from resnet_in1k.cli import arguments as cli
from resnet_in1k.cli.load_recipe import GivenRecipe, find_recipe
from resnet_in1k.evaluate.statistics import describe_distance, distance
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.scaling import scaled_fields
from resnet_in1k.recipes.step_counts import accumulation_steps
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.train.loop import train
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.utils import files, imagenet
from resnet_in1k.utils.distributed import world_size
from resnet_in1k.utils.errors import UserError

DEFAULT_RECIPE = "tutorial"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a ResNet by a named recipe; any field of the recipe can be overridden."""

    recipe: str = DEFAULT_RECIPE
    """Which recipe: a name of --list-recipes, or that of a run: hub:USER/NAME, a run folder or its recipe.json. The
    defaults of the recipe's own flags below are its values, for the batch and epochs given."""
    list_recipes: bool = False
    """Print the named recipes as a table, and stop."""
    how: TrainOptions
    what: Recipe


def given_recipe() -> GivenRecipe:
    """What `--recipe` names; raises UserError if it cannot be found."""
    return find_recipe(cli.value_of_flag("--recipe", default=DEFAULT_RECIPE))


def parse(given: GivenRecipe) -> Arguments:
    """Raises UserError if the recipe needs weights to start from, and none are given."""
    name, named = given.origin or given.name, given.named
    what = _defaults(named.recipe)
    batch = _number_given("global_batch_size") or named.recipe.global_batch_size
    accumulation = accumulation_steps(batch, world_size(), named.images_per_forward_pass)
    how = TrainOptions(**given.options, gradient_accumulation_steps=accumulation)
    arguments = cli.parse(Arguments, default=Arguments(recipe=name, how=how, what=what))
    needs_weights = named.needs_weights or "init_from" in given.facts
    if needs_weights and arguments.how.init_from is None and not arguments.list_recipes:
        raise UserError(
            f"--recipe {name} starts from trained weights: give --init-from, such as a run folder, USER/NAME on the "
            "Hub or torchvision/resnet50.IMAGENET1K_V2"
        )
    return arguments


def _defaults(recipe: Recipe) -> Recipe:
    """What follows from the batch, epochs, image size and rule that are given; what is no number or out of range, the
    parser refuses later."""
    rule = cli.value_of_flag("--lr-batch-rule", default=recipe.lr_batch_rule)
    given = {name: _number_given(name) for name in ("epochs", "global_batch_size", "image_size")}
    try:
        recipe = replace(recipe, lr_batch_rule=rule)
        fields = scaled_fields(recipe, **given)
        fields.pop("global_batch_size", None)  # an odd one may be right only with another flag
        return replace(recipe, **fields)
    except UserError:
        return recipe


def _number_given(field: str) -> int:
    """0 if there is none."""
    value = cli.value_of_flag(f"--{field.replace('_', '-')}", default="")
    return int(value) if value.isdecimal() else 0


def describe_recipes() -> str:
    """A table to choose by: what each takes, and what is published of it."""
    header = ("recipe", "epochs", "px", "batch", "top-1 %", "top-5 %", "GPU hours", "on", "measured here")
    rows = [header]
    for name, named in RECIPES.items():
        recipe = named.recipe
        size = f"{recipe.initial_image_size}-{recipe.image_size}" if recipe.initial_image_size else recipe.image_size
        numbers = [f"{value:g}" if value is not None else "–" for value in (named.top1, named.top5, named.gpu_hours)]
        rows.append((name, recipe.epochs, size, recipe.global_batch_size, *numbers, named.hardware, named.measured))
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < place < 7 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    sources = [f"  {name:<{widths[0]}}  {named.source}" for name, named in RECIPES.items()]
    return "\n".join(
        [
            *lines,
            "",
            "px: training image size; accuracy on ImageNet-1k and GPU hours: as published by",
            *sources,
            "",
            "What one would take here:  python scripts/train.py --recipe NAME --data DATA --dry-run",
        ]
    )


def describe_outcome(given: GivenRecipe, run: RunFolder) -> str:
    """How far a run came from what is published of its recipe, in words; "" if nothing is."""
    result = files.read_json_object(run.evaluation)
    if result is None:
        return ""
    recipe, facts = read_recipe(run)
    if given.evaluation is not None:
        try:
            text = describe_distance(result, given.evaluation, given.origin)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            return f"the eval.json of {given.origin} is incomplete ({type(error).__name__}: {error})"
    elif given.named.top1 is not None and imagenet.is_of_imagenet(result, facts["data"]["num_train_images"]):
        text = f"published top-1 of {given.name} {given.named.top1:.2f} %: here {distance(result, given.named.top1)}"
    else:
        return ""
    changes = given.differences(recipe, facts) if given.facts else given.named.recipe.differences(recipe)
    return text + (f"; trained with {'; '.join(changes)}" if changes else "")


def main() -> Path | None:
    given = given_recipe()
    arguments = parse(given)
    if arguments.list_recipes:
        print(describe_recipes())
        return None
    folder = train(given.name, arguments.what, arguments.how)
    if not arguments.how.dry_run and cli.is_main_process() and (outcome := describe_outcome(given, RunFolder(folder))):
        print(outcome)
    return folder
