"""Train a ResNet.

accelerate launch [--config_file accelerate_configs/two_gpu.yaml] scripts/train.py --data data/imagenet
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# In place of scripts/, whose evaluate.py would hide the library of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from resnet_in1k import cli
from resnet_in1k.recipes import DEFAULT_DATA, RECIPES, Recipe
from resnet_in1k.training import TrainOptions, train


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a ResNet by a named recipe; any field of the recipe can be overridden."""

    recipe: Literal[tuple(RECIPES)] = "tutorial"  # type: ignore[valid-type]
    """Which recipe; the defaults of the recipe's own flags below are its values."""
    run: TrainOptions
    science: Recipe


def main() -> None:
    name = cli.choice_ahead("--recipe", default="tutorial")
    if name not in RECIPES:
        name = "tutorial"  # for the parser to have defaults when it refuses the unknown name
    default = Arguments(run=TrainOptions(data=DEFAULT_DATA[name]), science=RECIPES[name])
    arguments = cli.parse(Arguments, default=default)
    train(arguments.recipe, arguments.science, arguments.run)


if __name__ == "__main__":
    cli.run_script(main)
