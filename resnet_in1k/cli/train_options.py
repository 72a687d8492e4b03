"""The flags of train and benchmark, which include all fields of the recipe. Imports nothing slow."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from resnet_in1k.cli.arguments import POSITIONAL
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.validation import PrecisionFlag, check_options, within

DEFAULT_RECIPE = "tutorial"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a ResNet by a named recipe. Every field of the recipe is a flag; the recipe's value is its default.

    Examples:
        {prog} --recipe demo
        {prog} --recipe sprint --data photos --val-share 0.2 --output-dir runs/photos --dry-run
        {prog} --recipe a3 --data data/imagenet --resume
    """

    GROUPS: ClassVar = {"recipe": "Run"}

    recipe: str = DEFAULT_RECIPE
    """Name of a recipe (see --list-recipes; `tutorial` is a weak baseline), or the recipe of a run: hub:USER/NAME, a
    run folder or its recipe.json. If --epochs, --global-batch-size or --image-size are given, other fields are scaled
    to fit them."""
    list_recipes: bool = False
    """Print the named recipes as a table, then exit."""
    options: TrainOptions
    fields: Recipe


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Measure the speed of this machine. Every field of the recipe is a flag.

    Examples:
        {prog} input --data photos
        {prog} step --optimizer muon
        {prog} train --data photos --workers 1 --json
    """

    GROUPS: ClassVar = {"what": "Benchmark", "workers": "Hardware"}

    what: Literal["input", "step", "train"] = field(metadata=POSITIONAL)
    """input: encoded files to batches on the device; step: training on one batch, also by several processes; train:
    both."""
    data: str = "synthetic"
    """Images, named as for training; a folder needs train/ only."""
    json: bool = False
    """Print one JSON object instead of a table."""
    batch_size: int | None = field(default=None, metadata=within(at_least=1))
    """Images per step and process, in place of --global-batch-size; by default 16 on a CPU, 256 elsewhere."""
    steps: int | None = field(default=None, metadata=within(at_least=1))
    """Steps per repetition; by default 30 for input; for step and train 3 on a CPU, 50 elsewhere."""
    repetitions: int = field(default=5, metadata=within(at_least=1))
    """Repetitions of each measurement, after one that is not counted."""

    workers: int | None = field(default=None, metadata=within(at_least=1))
    """Loader workers; by default as for training."""
    precision: PrecisionFlag = "auto"
    """Our training precision; the tutorial's is float32."""
    compile: bool = False
    """Compile our model by torch.compile."""
    compress_gradients: bool = False
    """Send gradients between several processes as bf16."""
    cpu_threads: int | None = field(default=None, metadata=within(at_least=1))
    """Threads for computing on the CPU; by default all physical cores."""

    recipe: Recipe = RECIPES[DEFAULT_RECIPE].recipe

    def __post_init__(self) -> None:
        check_options(self)
        if self.recipe.shuffle_window:
            raise UserError("--shuffle-window: benchmark.py reads images in random order")
