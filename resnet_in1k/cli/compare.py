"""Compare runs and weights: recipes, accuracy, time and speed."""

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from resnet_in1k.cli.arguments import parse
from resnet_in1k.cli.options import CompareOptions
from resnet_in1k.evaluate.statistics import confidence_interval, describe_paired, different_conditions, paired, welch
from resnet_in1k.model.resolve import resolve_checkpoint
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import duration
from resnet_in1k.utils.plots import figure_labels, save_figure
from resnet_in1k.utils.process import program

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Compared:
    """One row of the table: an evaluation and, for a run, what its recipe.json and log record."""

    name: str
    evaluation: dict[str, Any]
    recipe: tuple[Recipe, dict[str, Any]] | None = None
    """The recipe, and all of recipe.json."""
    rates: Sequence[float] = ()
    """Images per second, at each line of the log."""
    epochs: Sequence[dict[str, Any]] = ()
    """The log's records of epochs, with `minutes` of loading, training and validation up to the end of each."""


def compare(options: CompareOptions) -> str:
    """Return the table, the differences of the recipes, the means over seeds, and significance tests."""
    rows = [_read(item) for item in options.items]
    if len({row.name for row in rows}) < len(rows):  # such as the runs sprint/0 and finetune/0
        rows = [replace(row, name=str(Path(item))) for row, item in zip(rows, options.items, strict=True)]
    runs = [row for row in rows if row.recipe]
    groups, not_counted = _seed_groups(runs)
    single = [row for row in rows if row not in itertools.chain(*groups)]  # pairs of seeds would be too many
    parts = [_table(rows), _recipes(runs), _seeds(groups, not_counted), _pairs(single) if len(single) > 1 else ""]
    if options.picture is not None:
        if not any(row.epochs for row in rows):
            raise UserError(f"--picture {options.picture}: no item has a log with epochs to plot")
        with files.user_errors("--picture: "):
            drawn = [row for row in rows if row.epochs]
            with figure_labels([row.name for row in drawn], [f"run {number}" for number in range(len(drawn))]) as names:
                named = [replace(row, name=name) for row, name in zip(drawn, names, strict=True)]
                save_figure(draw(named), options.picture)
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
            f"{item} has no eval.json of its own: {program('evaluate')} --ckpt {shlex.quote(str(item))} --data DATA "
            "--output NAME.json, and compare NAME.json"
        )
    run, seconds = RunFolder(path), 0.0
    recipe, records = read_recipe(run) if run.recipe.exists() else None, run.records()
    rates = [record["images_per_second"] for record in records if record["kind"] == "train"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    for epoch in epochs:
        seconds += sum(epoch[f"{part}_seconds"] for part in ("load", "train", "val"))
        epoch["minutes"] = seconds / 60
    return Compared(path.name or item, evaluation, recipe, rates, epochs)


def _table(rows: Sequence[Compared]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  top-1 (95% interval)         top-5     images   time            images/s"]
    for row in rows:
        result, name = row.evaluation, f"{row.name:{width}}"
        low, high = confidence_interval(result["top1_correct"], result["num_images"])
        top1 = f"{result['top1_accuracy']:7.2%} ({low:.2%} to {high:.2%})"
        took = duration(row.epochs[-1]["minutes"] * 60) if row.epochs else "–"
        rate = f"{median(row.rates):,.0f}" if row.rates else "–"
        counts = f"{result['top5_accuracy']:7.2%}  {result['num_images']:8,}"
        lines.append(f"{name}  {top1}  {counts}   {took:<14}  {rate:>8}")
    return "\n".join(lines)


def _recipes(rows: Sequence[Compared]) -> str:
    """Return the differences from the first recipe; "" if there is only one."""
    if len(rows) < 2:
        return ""
    lines = [f"recipes, compared with {rows[0].name}:"]
    lines += [f"  {row.name}: {'; '.join(differences(rows[0].recipe, row.recipe)) or 'the same'}" for row in rows[1:]]
    return "\n".join(lines)


def differences(first: tuple[Recipe, dict[str, Any]], second: tuple[Recipe, dict[str, Any]]) -> list[str]:
    """Return how the second of two runs differs, by their recipes and recipe.json, one text per difference."""
    (recipe, facts), (other_recipe, other_facts) = first, second
    lines = recipe.differences(other_recipe)
    data, other_data = (each.get("data", {}).get("fingerprint", {}).get("train") for each in (facts, other_facts))
    if data != other_data:
        lines.append("other training images")
    initial, other = (each.get("init_from") or {"checkpoint": "random weights"} for each in (facts, other_facts))
    if initial.get("sha256") != other.get("sha256"):
        lines.append(f"started from {initial['checkpoint']} → {other['checkpoint']}")
    teachers = [each.get("teacher") or {"checkpoint": "none"} for each in (facts, other_facts)]
    if teachers[0].get("sha256") != teachers[1].get("sha256"):
        lines.append(f"teacher {teachers[0]['checkpoint']} → {teachers[1]['checkpoint']}")
    for name in ("mixed_precision", "world_size", "gradient_accumulation_steps"):
        if facts.get(name) != other_facts.get(name):
            lines.append(f"{name} {facts.get(name)} → {other_facts.get(name)}")
    return lines


def _seed_groups(runs: Sequence[Compared]) -> tuple[list[list[Compared]], list[str]]:
    """Return groups of two or more finished runs that differ in seed only, and notes on runs that are not counted."""
    groups, notes = [], []
    for run in runs:
        alike = [g for g in groups if all(text.startswith("seed ") for text in differences(g[0].recipe, run.recipe))]
        group = next((g for g in alike if not different_conditions(g[0].evaluation, run.evaluation)), [])
        taken = {mark: each.name for each in group for mark in (each.recipe[0].seed, each.evaluation["weights_sha256"])}
        if run.epochs and not _is_finished(run.recipe[0], run.epochs):
            last, epochs = run.epochs[-1]["epoch"], run.recipe[0].epochs
            notes.append(f"  {run.name} is not counted: it is unfinished, epoch {last} of {epochs}")
        elif same := taken.get(run.recipe[0].seed) or taken.get(run.evaluation["weights_sha256"]):
            notes.append(f"  {run.name} is not counted: it has the seed or the weights of {same}")
        elif group:
            group.append(run)
        else:
            groups.append([run])
            notes += [f"  {run.name} is not counted with {g[0].name}: other images or preprocessing" for g in alike[:1]]
    return [group for group in groups if len(group) > 1], notes


def _is_finished(recipe: Recipe, epochs: Sequence[dict[str, Any]]) -> bool:
    """Return True if a log ends with the recipe's last epoch or by early stopping."""
    last, best = epochs[-1]["epoch"], max(epochs, key=lambda epoch: epoch["top1_accuracy"])["epoch"]
    return last >= recipe.epochs or 0 < recipe.early_stopping_epochs <= last - best


def _seeds(groups: Sequence[Sequence[Compared]], notes: Sequence[str]) -> str:
    """Return the mean and standard deviation of each group, and Welch's test for each pair of groups."""
    lines, tested = ["seeds (mean ± standard deviation; not compared image by image):"], []
    for group in groups:
        first, correct = group[0], [run.evaluation["top1_correct"] for run in group]
        # sprint-0 of seed 0 becomes sprint; resnet50 does not become resnet5
        stem = re.sub(rf"[-_./]*(seed)?[-_=]*(?<!\d){first.recipe[0].seed}$", "", first.name) or first.name
        name = f"{stem} (seeds {', '.join(str(run.recipe[0].seed) for run in group)})"
        top1, deviation = (value / first.evaluation["num_images"] for value in (mean(correct), stdev(correct)))
        lines.append(f"  {name}: top-1 {top1:.2%} ± {deviation:.2%}, n = {len(group)}")
        if len({run.recipe[1].get("commit") for run in group}) > 1:
            lines.append("    the commits of the code differ")
        tested.append((name, correct, first.evaluation))
    for (a, in_a, of_a), (b, in_b, of_b) in itertools.combinations(tested, 2):
        differ = different_conditions(of_a, of_b)
        gap = "not comparable: other images or preprocessing" if differ else welch(in_a, in_b, of_a["num_images"])
        lines.append(f"  {a} minus {b}: {gap}")
    return "\n".join([*lines, *notes]) if groups else ""


def _pairs(rows: Sequence[Compared]) -> str:
    lines = ["image by image:"]
    for a, b in itertools.combinations(rows, 2):
        with files.content_errors(f"the evaluation of {a.name} or {b.name}"):
            found = paired(a.evaluation, b.evaluation)
        if found is not None:
            lines.append(f"  {describe_paired(found, a.name, b.name)}")
    if len(lines) == 1:
        lines = ["image by image: not comparable; the images differ, or eval.json does not record which are right"]
    return "\n".join(lines)


def draw(rows: Sequence[Compared]) -> "Figure":
    """Plot validation top-1 of each run over epochs and over minutes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, unit in ((left, "epoch"), (right, "minutes")):
        for row in rows:
            accuracies = [epoch["top1_accuracy"] for epoch in row.epochs]
            axes.plot([epoch[unit] for epoch in row.epochs], accuracies, marker=".", label=row.name)
        axes.set(xlabel=unit, xlim=(0, None))
        axes.grid(alpha=0.25)
    left.set_ylabel("validation top-1")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    figure.legend(handles=left.lines, loc="outside lower center", ncols=min(4, len(rows)), frameon=False)
    return figure


def main() -> None:
    print(compare(parse(CompareOptions)))
