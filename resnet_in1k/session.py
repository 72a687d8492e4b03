"""One sitting of a run: with what it computes, and whether it may go on with what another has begun."""

from typing import Any

from resnet_in1k.devices import Precision
from resnet_in1k.errors import UserError
from resnet_in1k.plan import PRECISION_NAMES, Plan
from resnet_in1k.recipes import Recipe
from resnet_in1k.run_folder import RunFolder, provenance, read_recipe

SAME_BITS = ("world_size", "gradient_accumulation_steps", "hardware", "cpu_threads")
"""What must stay as it was for a resumed run to end with the same bits."""


def session_facts(plan: Plan, mixed_precision: str, hardware: str, cpu_threads: int) -> dict[str, Any]:
    """What this process runs with, as recipe.json has it."""
    return {
        "world_size": plan.num_processes,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "mixed_precision": mixed_precision,
        "hardware": hardware,
        "cpu_threads": cpu_threads,
        **provenance(),
    }


def precision_of(run: RunFolder, asked: Precision) -> Precision:
    """A run that is resumed keeps its own, wherever it goes on, unless another is asked for; that is refused later."""
    if asked != "auto" or not run.recipe.exists():
        return asked
    _, facts = read_recipe(run)
    precisions: dict[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
    return precisions.get(facts.get("mixed_precision", ""), "auto")


def check_resumable(run: RunFolder, recipe: Recipe, data: dict[str, Any], session: dict[str, Any]) -> str:
    """What to tell of a run that goes on otherwise than before, but may; "" if it goes on alike.

    Raises:
        UserError: with all differences, if recipe, data or precision are others than those that it was begun with.
    """
    begun, facts = read_recipe(run)
    differences = begun.objections_to(recipe)
    try:
        if facts["data"]["fingerprint"] != data["fingerprint"]:
            differences.append(f"data {facts['data']['source']} → {data['source']} (other files)")
        precisions = [entry["mixed_precision"] for entry in (facts, session)]
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.recipe} does not tell what the run was begun with ({error} is missing)") from None
    if precisions[0] != precisions[1]:
        differences.append("precision " + " → ".join(PRECISION_NAMES.get(name, name) for name in precisions))
    if differences:
        raise UserError(
            f"{run.path} was begun otherwise: {'; '.join(differences)}; "
            "resume with what it was begun with, or choose another --output-dir"
        )
    before = [facts, *facts.get("resumed", [])][-1]
    changed = [
        f"{name} {before.get(name)} → {session[name]}" for name in SAME_BITS if before.get(name) != session[name]
    ]
    if not changed:
        return ""
    return (
        f"{'; '.join(changed)}: the same batches in the same order, but sums are rounded otherwise, and a part of a "
        "batch has norm statistics of its own; bits will differ from those of an uninterrupted run"
    )
