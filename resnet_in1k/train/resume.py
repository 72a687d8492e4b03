"""Conditions of a resume, and what would differ from an uninterrupted run."""

from collections.abc import Sequence
from typing import Any

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.recipes.step_counts import StepCounts
from resnet_in1k.run_folder import FORMAT_VERSION, RunFolder, provenance, read_recipe
from resnet_in1k.utils.device import PRECISIONS, PrecisionFlag
from resnet_in1k.utils.errors import UserError

SAME_BITS = ("world_size", "gradient_accumulation_steps", "compress_gradients", "hardware", "cpu_threads")
"""Facts that must not change for a resumed run to end with the same bits."""


def run_facts(
    counts: StepCounts,
    *,
    command: Sequence[str],
    mixed_precision: str,
    hardware: str,
    cpu_threads: int,
    compress_gradients: bool,
    dollars_per_hour: float,
    initial: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the facts about this process, for recipe.json.

    Args:
        command: script and flags; empty if another program called `train`.
        mixed_precision: Accelerate's name.
        initial: facts of the initial weights; None for random ones.
    """
    return {
        **({"command": list(command)} if command else {}),
        "world_size": counts.num_processes,
        "gradient_accumulation_steps": counts.gradient_accumulation_steps,
        "mixed_precision": mixed_precision,
        "compress_gradients": compress_gradients,
        "hardware": hardware,
        "cpu_threads": cpu_threads,
        **({"dollars_per_hour": dollars_per_hour} if dollars_per_hour else {}),
        **({"init_from": initial} if initial else {}),
        **provenance(),
    }


def precision_of(run: RunFolder, requested: PrecisionFlag, recipe_class: type[Recipe]) -> PrecisionFlag:
    """Return the precision of a run that is resumed, unless another is requested, which `check_resumable` refuses."""
    if requested != "auto" or not run.recipe.exists():
        return requested
    _, facts = read_recipe(run, recipe_class)
    known = PRECISIONS.get(facts.get("mixed_precision", ""))
    return known.flag if known else "auto"


def check_resumable(run: RunFolder, recipe: Recipe, data: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return what will differ from an uninterrupted run, although the run may be resumed; "" for nothing.

    Raises:
        UserError: with all differences, if recipe, data or precision differ from those at the start, or if an older
            version of resnet-in1k started the run.
    """
    started_with, written = read_recipe(run, type(recipe))
    if written["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{run.path} was started by an older version of resnet-in1k (commit {written.get('commit')}), which draws "
            "other random augmentation; resume it with that version, or start again in another --output-dir"
        )
    differences = started_with.incompatibilities(recipe)
    try:
        if written["data"]["fingerprint"] != data["fingerprint"]:
            differences.append(f"data {written['data']['source']} → {data['source']} (other files)")
        precisions = [entry["mixed_precision"] for entry in (written, facts)]
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.recipe} is incomplete: {error} is missing; restore the file") from None
    if precisions[0] != precisions[1]:
        labels = [PRECISIONS[name].label if name in PRECISIONS else name for name in precisions]
        differences.append("precision " + " → ".join(labels))
    if differences:
        raise UserError(
            f"{run.path} was started with other settings: {'; '.join(differences)}; resume with the settings of its "
            "start, or choose another --output-dir"
        )
    before = [written, *written.get("resumed", [])][-1]
    was = {name: before.get(name, facts[name]) for name in SAME_BITS}
    changed = [f"{name} {was[name]} → {facts[name]}" for name in SAME_BITS if was[name] != facts[name]]
    if not changed:
        return ""
    return (
        f"{'; '.join(changed)}: the same batches in the same order, but sums are rounded differently, and each part of "
        "a batch has norm statistics of its own; bits will differ from those of an uninterrupted run"
    )
