"""Writing to the run folder: the main process writes, the others wait and fail with it.

All processes call each function alike. If the main process cannot write, all raise UserError, and what was there before
is intact.
"""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from resnet_in1k.evaluate.evaluation import Evaluation
from resnet_in1k.run_folder import RunFolder, write_recipe
from resnet_in1k.train.checkpoint import TrainState, checkpoint_folder, list_checkpoints, save_checkpoint, write_state
from resnet_in1k.train.trainer import Trainer
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import SAVED_IS_INTACT
from resnet_in1k.utils.plots import draw_curves, figure_labels, save_figure, show_in_notebook


def lock_folder(run: Trainer) -> None:
    """Make the run folder, lock it until the run ends, and remove what a killed run has left incomplete."""

    def lock() -> None:
        run.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        run.stack.enter_context(files.lock_folder(run.folder.path))
        files.remove_temporaries(run.folder.path)

    run.launch.on_main_process(lock, "locking the run folder")


def write_start(run: Trainer, evaluation_is_pending: bool) -> None:
    """Describe the run, or its resume after the state's step; roll back what was written after that state."""
    state, folder = run.state, run.folder

    def write() -> None:
        run.damaged_steps = {step for step, _ in list_checkpoints(folder.checkpoints) if step > state.step}
        folder.truncate_log(state.step, evaluation_is_pending)
        _publish_best(folder, state)
        if run.started_with:
            recipe = {"name": run.recipe_name, **dataclasses.asdict(run.recipe)}  # its number of epochs may have grown
            resumed = [*run.started_with.get("resumed", []), {"after_step": state.step, **run.facts}]
            files.write_json(folder.recipe, {**run.started_with, "recipe": recipe, "resumed": resumed})
        else:
            write_recipe(folder, run.recipe_name, run.recipe, run.data_facts, run.facts)

    run.launch.on_main_process(write, "describing the run", SAVED_IS_INTACT)


def write_lines(run: Trainer, path: Path, lines: Iterable[str]) -> None:
    """Write a text file; without lines only if the file exists already."""
    text = "".join(f"{line}\n" for line in lines)

    def write() -> None:
        if text or path.exists():  # asked on the main process alone: the others may see the folder later
            files.write_text(path, text)

    run.launch.on_main_process(write, f"writing {path.name}", SAVED_IS_INTACT)


def write_checkpoint(run: Trainer) -> None:
    """Write the checkpoint of the state, then delete those that are no longer needed.

    A weight that is not finite is an error, too; nothing is written then.
    """

    def write() -> None:
        tensors = {name: group.tensors() for name, group in run.groups.items()}
        weights = [each for name in run.models for each in tensors[name].items()]
        if broken := [name for name, tensor in weights if not tensor.isfinite().all()]:
            raise UserError(
                f"after step {run.state.step:,} {broken[0]} is not finite and was not saved; try a lower --lr in "
                "another --output-dir"
            )
        save_checkpoint(run.folder.checkpoints, run.state, tensors)
        run.damaged_steps.discard(run.state.step)
        _prune(run)

    run.launch.on_main_process(write, "writing a checkpoint", SAVED_IS_INTACT)


def finish_epoch(run: Trainer, evaluation: Evaluation, is_best: bool) -> None:
    """Draw the curves, add the evaluation to the checkpoint, and publish its weights if they are the best so far.

    In this order, after the epoch's record: a run killed before its checkpoint has the evaluation repeats the epoch's
    end when it is resumed; a run killed after that publishes.
    """
    state, folder = run.state, run.folder
    title = f"{run.recipe.model} on {run.train_source.name}, recipe {run.recipe_name}"

    def write() -> None:
        with figure_labels([title], [f"{run.recipe.model}, recipe {run.recipe_name}"]) as (drawable_title,):
            figure = draw_curves(folder.records(), drawable_title, evaluation.counts["top_k"])
            for suffix in (".svg", ".png"):
                save_figure(figure, folder.curves.with_suffix(suffix))
            run.shown_curves = show_in_notebook(figure, run.shown_curves)
        if is_best:
            publish = run.recipe.publish
            state.best_evaluation = evaluation.to_json(state.sha256[f"{publish}.safetensors"], publish)
        write_state(checkpoint_folder(folder.checkpoints, state.step), state)
        _publish_best(folder, state)
        _prune(run)

    run.launch.on_main_process(write, "publishing the best weights and drawing the curves", SAVED_IS_INTACT)


def _publish_best(folder: RunFolder, state: TrainState) -> None:
    """Make model.safetensors and eval.json those of the best evaluation that the state contains.

    They are older or newer after a kill between an epoch's checkpoint and here, or if a newer checkpoint is damaged.
    """
    best = state.best_evaluation
    if best is None:
        return
    if not _has_sha256(folder.weights, best["weights_sha256"]):
        kept = checkpoint_folder(folder.checkpoints, state.best_step) / f"{best['weights']}.safetensors"
        if not _has_sha256(kept, best["weights_sha256"]):
            return  # newer weights were better, and stay until the repeated epoch publishes them again
        files.write_atomically(folder.weights, lambda path: shutil.copyfile(kept, path))
    files.write_json(folder.evaluation, best)


def _has_sha256(file: Path, sha256: str) -> bool:
    return file.is_file() and files.sha256_of(file) == sha256


def _prune(run: Trainer) -> None:
    """Delete all checkpoints except the newest and the best; damaged ones are neither deleted nor counted."""
    checkpoints = list_checkpoints(run.folder.checkpoints)
    intact = [(step, folder) for step, folder in checkpoints if step not in run.damaged_steps]
    for step, folder in intact[: -run.options.keep_checkpoints]:
        if step != run.state.best_step:
            files.delete_folder(folder)
