"""scripts/train.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resnet_in1k.commands import cli
from resnet_in1k.recipes.named import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.train.loop import train
from resnet_in1k.train.options import TrainOptions

DEFAULT_RECIPE = "tutorial"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a ResNet by a named recipe; any field of the recipe can be overridden."""

    recipe: Literal[tuple(RECIPES)] = DEFAULT_RECIPE  # type: ignore[valid-type]
    """Which recipe; the defaults of the recipe's own flags below are its values."""
    how: TrainOptions
    what: Recipe


def parse() -> Arguments:
    name = cli.value_of_flag("--recipe", default=DEFAULT_RECIPE)
    # The parser needs defaults even to refuse an unknown name.
    named = RECIPES.get(name, RECIPES[DEFAULT_RECIPE])
    return cli.parse(Arguments, default=Arguments(how=TrainOptions(data=named.default_data), what=named.recipe))


def main() -> Path:
    arguments = parse()
    return train(arguments.recipe, arguments.what, arguments.how)
