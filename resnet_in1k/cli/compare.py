"""scripts/compare.py: compare runs and weights: their recipes, accuracy, time and speed."""

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
"""A plot with more lines is hard to read."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare runs and evaluations."""

    items: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, weights with an eval.json in the same folder, or eval.json files."""
    picture: Path | None = None
    """Plot the runs' accuracy over epochs and over hours to this .png or .svg."""

    def __post_init__(self) -> None:
        if len(self.items) < 2:
            raise UserError("nothing to compare; name at least two runs, weights or eval.json files")
        if len(self.items) > MAX_COMPARED:
            raise UserError(f"{len(self.items)} are too many for one table; at most {MAX_COMPARED}")
        if self.picture is not None and self.picture.suffix not in (".png", ".svg"):
            raise UserError(f"--picture {self.picture}: must end in .png or .svg")


@dataclass(frozen=True)
class Compared:
    """One row of the table."""

    name: str
    evaluation: dict[str, Any]
    """eval.json."""
    recipe: Recipe | None = None
    started_from: str = "random weights"
    rate: float | None = None
    """Median of the log's images per second."""
    epochs: Sequence[dict[str, Any]] = ()
    """Records of the log's epochs."""
    hours: Sequence[float] = ()
    """Hours of loading, training and validation up to the end of each epoch."""


def compare(options: CompareOptions) -> str:
    """Return the table, the differences of the recipes, and a significance test for evaluations of the same images."""
    rows = [_read(item) for item in options.items]
    parts = [_table(rows), _recipes([row for row in rows if row.recipe is not None]), _pairs(rows)]
    if options.picture is not None:
        if not any(row.epochs for row in rows):
            raise UserError(f"--picture {options.picture}: no item has a log with epochs to plot")
        with files.user_errors("--picture: "):
            save_figure(draw([row for row in rows if row.epochs]), options.picture)
        parts.append(f"figure written to {options.picture}")
    return "\n\n".join(part for part in parts if part)


def _read(item: str) -> Compared:
    path = Path(item)
    if path.is_file() and path.suffix == ".json":
        evaluation = files.read_json_object(path)
        if evaluation is None or "top1_correct" not in evaluation:
            raise UserError(f"{path} is not an evaluation; evaluate.py --output writes one")
        return Compared(path.stem if path.stem != "eval" else path.parent.name, evaluation)
    evaluation = resolve_checkpoint(item).recorded_evaluation
    if evaluation is None:
        raise UserError(
            f"{item} has no eval.json of its own: python scripts/evaluate.py --ckpt {item} --data DATA --output "
            "NAME.json, and compare NAME.json"
        )
    run, recipe, initial = RunFolder(path), None, Compared.started_from
    if run.recipe.exists():
        recipe, facts = read_recipe(run)
        initial = facts.get("init_from", {}).get("checkpoint", initial)
    records = run.records()
    rates = [record["images_per_second"] for record in records if record["kind"] == "train"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    seconds = [sum(epoch[f"{part}_seconds"] for part in ("load", "train", "val")) for epoch in epochs]
    hours = [total / 3600 for total in itertools.accumulate(seconds)]
    return Compared(path.name or item, evaluation, recipe, initial, median(rates) if rates else None, epochs, hours)


def _table(rows: Sequence[Compared]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  top-1 (95% interval)         top-5     images   time            images/s"]
    for row in rows:
        result, name = row.evaluation, f"{row.name:{width}}"
        low, high = confidence_interval(result["top1_correct"], result["num_images"])
        top1 = f"{result['top1_accuracy']:7.2%} ({low:.2%} to {high:.2%})"
        took = duration(row.hours[-1] * 3600) if row.epochs else "–"
        rate = f"{row.rate:,.0f}" if row.rate else "–"
        counts = f"{result['top5_accuracy']:7.2%}  {result['num_images']:8,}"
        lines.append(f"{name}  {top1}  {counts}   {took:<14}  {rate:>8}")
    return "\n".join(lines)


def _recipes(rows: Sequence[Compared]) -> str:
    """Differences from the first recipe."""
    if len(rows) < 2:
        return ""
    first, *others = rows
    lines = [f"recipes, compared with {first.name}:"]
    for row in others:
        changes = first.recipe.differences(row.recipe)
        if row.started_from != first.started_from:
            changes.append(f"started from {first.started_from} → {row.started_from}")
        lines.append(f"  {row.name}: {'; '.join(changes) or 'the same'}")
    return "\n".join(lines)


def _pairs(rows: Sequence[Compared]) -> str:
    lines = ["image by image:"]
    for a, b in itertools.combinations(rows, 2):
        with files.content_errors(f"the evaluation of {a.name} or {b.name}"):
            found = paired(a.evaluation, b.evaluation)
        if found is not None:
            lines.append(f"  {found.describe(a.name, b.name)}")
    if len(lines) == 1:
        return "image by image: not comparable; the images differ, or eval.json does not record which are right"
    return "\n".join(lines)


def draw(rows: Sequence[Compared]) -> "Figure":
    """Plot validation top-1 of each run over epochs and over hours."""
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
    over_epochs.grid(alpha=0.25)
    over_hours.grid(alpha=0.25)
    legend = figure.legend(loc="outside lower center", ncols=min(4, len(rows)), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # text between two $ in a name is not a formula
    return figure


def main() -> None:
    print(compare(parse(CompareOptions)))
