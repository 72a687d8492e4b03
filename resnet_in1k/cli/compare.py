"""scripts/compare.py: runs and weights side by side: their recipes, how good they are, what they took."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from resnet_in1k.cli.arguments import parse
from resnet_in1k.evaluate.statistics import confidence_interval, paired
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import duration
from resnet_in1k.utils.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COMPARED = 10
"""More lines than that are hard to tell apart in one figure."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What to compare."""

    items: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, weights as for evaluate.py if an eval.json lies beside them, or eval.json files."""
    picture: Path | None = None
    """Draw the runs' accuracy over epochs and over hours to this .png or .svg."""

    def __post_init__(self) -> None:
        if len(self.items) < 2:
            raise UserError("nothing to compare; name at least two runs, weights or eval.json files")
        if len(self.items) > MAX_COMPARED:
            raise UserError(f"{len(self.items)} are too many for one table; at most {MAX_COMPARED}")
        if self.picture is not None and self.picture.suffix not in (".png", ".svg"):
            raise UserError(f"--picture {self.picture}: a file that ends in .png or .svg")


@dataclass(frozen=True)
class Compared:
    """One row."""

    name: str
    evaluation: dict[str, Any]
    recipe: Recipe | None
    records: list[dict[str, Any]]
    """log.jsonl; none of weights without a run."""
    started_from: str = "random weights"
    """Of a run."""

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "epoch"]

    @property
    def hours(self) -> list[float]:
        """Of loading, training and validation, up to each epoch's end."""
        seconds = [sum(epoch[f"{part}_seconds"] for part in ("load", "train", "val")) for epoch in self.epochs]
        return [total / 3600 for total in itertools.accumulate(seconds)]

    @property
    def images_per_second(self) -> float | None:
        rates = [record["images_per_second"] for record in self.records if record["kind"] == "train"]
        return median(rates) if rates else None


def compare(options: CompareOptions) -> str:
    """The table, what differs in the recipes, and for evaluations of the same images whether they differ by chance.

    Raises:
        UserError: if something cannot be read or was not evaluated, or the picture cannot be written.
    """
    rows = [_read(item) for item in options.items]
    text = "\n\n".join(part for part in (_table(rows), _recipes(rows), _pairs(rows)) if part)
    if options.picture is not None:
        path = options.picture
        drawn = [row for row in rows if row.epochs]
        if not drawn:
            raise UserError(f"--picture {path}: none of these has a log to draw")
        if problem := files.failure_of(lambda: save_figure(draw(drawn), path)):
            raise UserError(f"--picture: {problem}")
        text += f"\n\nfigure written to {path}"
    return text


def _read(item: str) -> Compared:
    path = Path(item)
    if path.is_file() and path.suffix == ".json":
        evaluation = files.read_json_object(path)
        if evaluation is None or "top1_correct" not in evaluation:
            raise UserError(f"{path} is no evaluation; evaluate.py --output writes one")
        return Compared(path.stem if path.stem != "eval" else path.parent.name, evaluation, None, [])
    weights = resolve_checkpoint(item)
    if weights.recorded_evaluation is None:
        raise UserError(
            f"{item} has no evaluation beside it: python scripts/evaluate.py --ckpt {item} --data DATA --output "
            "NAME.json, and compare NAME.json"
        )
    run = RunFolder(path)
    if not run.recipe.exists():
        return Compared(path.name or item, weights.recorded_evaluation, None, run.records())
    recipe, facts = read_recipe(run)
    initial = facts.get("init_from", {}).get("checkpoint", Compared.started_from)
    return Compared(path.name or item, weights.recorded_evaluation, recipe, run.records(), initial)


def _table(rows: Sequence[Compared]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  top-1 (95 % interval)        top-5     images   time            images/s"]
    for row in rows:
        result = row.evaluation
        low, high = confidence_interval(result["top1_correct"], result["num_images"])
        took = duration(row.hours[-1] * 3600) if row.epochs else "–"
        rate = f"{row.images_per_second:,.0f}" if row.images_per_second else "–"
        lines.append(
            f"{row.name:{width}}  {result['top1_accuracy']:7.2%} ({low:.2%} to {high:.2%})  "
            f"{result['top5_accuracy']:7.2%}  {result['num_images']:8,}   {took:<14}  {rate:>8}"
        )
    return "\n".join(lines)


def _recipes(rows: Sequence[Compared]) -> str:
    """What differs from the first recipe."""
    with_recipe = [row for row in rows if row.recipe is not None]
    if len(with_recipe) < 2:
        return ""
    first, *others = with_recipe
    lines = [f"recipes, beside that of {first.name}:"]
    for row in others:
        changes = first.recipe.differences(row.recipe)
        if row.started_from != first.started_from:
            changes.append(f"started from {first.started_from} → {row.started_from}")
        lines.append(f"  {row.name}: {'; '.join(changes) or 'the same'}")
    return "\n".join(lines)


def _pairs(rows: Sequence[Compared]) -> str:
    lines = []
    for a, b in itertools.combinations(rows, 2):
        try:
            found = paired(a.evaluation, b.evaluation)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the evaluations of {a.name} and {b.name} cannot be compared ({error})") from None
        if found is not None:
            lines.append(f"  {found.describe(a.name, b.name)}")
    if lines:
        return "\n".join(["image by image:", *lines])
    return "image by image: these are evaluations of different images, or made before which were right was recorded"


def draw(rows: Sequence[Compared]) -> "Figure":
    """Validation top-1 of each run over its epochs, and over the hours that it took."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    over_epochs, over_hours = figure.subplots(1, 2, sharey=True)
    in_minutes = max(row.hours[-1] for row in rows) < 1
    for row in rows:
        accuracies = [epoch["top1_accuracy"] for epoch in row.epochs]
        over_epochs.plot([epoch["epoch"] for epoch in row.epochs], accuracies, marker=".", label=row.name)
        over_hours.plot([hours * (60 if in_minutes else 1) for hours in row.hours], accuracies, marker=".")
    over_epochs.set(xlabel="epoch", ylabel="validation top-1")
    over_epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_epochs.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    over_hours.set(xlabel="minutes" if in_minutes else "hours", xlim=(0, None))
    for axes in (over_epochs, over_hours):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside lower center", ncols=min(4, len(rows)), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names from anywhere: text between two $ would be parsed as a formula
    return figure


def main() -> None:
    print(compare(parse(CompareOptions, description="Compare runs and evaluations.")))
