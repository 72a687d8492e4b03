"""Writing to the run folder: the main process writes, the others wait and fail with it."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from resnet_in1k.evaluate.evaluation import Evaluation
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.model.weights import save_weights, weights_to_save
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, add_resume, write_recipe
from resnet_in1k.train.checkpoint import (
    TensorGroup,
    TrainState,
    checkpoint_folder,
    list_checkpoints,
    prune_checkpoints,
    rewrite_state,
    save_checkpoint,
)
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch
from resnet_in1k.utils.plots import draw_curves, save_figure, show_in_notebook


class RunWriter:
    """All processes call each method alike, with the same arguments; the main process writes.

    Raises:
        UserError: on all processes, if the main process cannot write; what was there before is intact then.
    """

    def __init__(self, folder: RunFolder, launch: Launch, keep_checkpoints: int):
        self._folder, self._launch, self._keep_checkpoints = folder, launch, keep_checkpoints
        self._damaged: set[int] = set()  # steps of checkpoints that were skipped when the run was resumed
        self._lock: TextIO | None = None
        self._shown: Any = None  # a notebook's handle of the curves

    def acquire_lock(self) -> None:
        """Make the folder, lock it until this process ends, and remove what a killed run has left incomplete."""

        def acquire() -> None:
            self._folder.create()
            if self._lock is None:  # this may be a retry, and a second lock would release the first
                self._lock = files.lock_folder(self._folder.path)
            files.remove_temporaries(self._folder.path)

        self._launch.on_main_process(acquire, "locking the run folder", advice="")

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()

    def start(
        self,
        state: TrainState,
        recipe_name: str,
        recipe: Recipe,
        data: dict[str, Any],
        facts: dict[str, Any],
        *,
        evaluation_pending: bool,
    ) -> None:
        """Describe the run, or its resume after `state`; roll back what was written after that state."""

        def write() -> None:
            self._damaged = {step for step, _ in list_checkpoints(self._folder.checkpoints) if step > state.step}
            self._folder.truncate_log(state.step, evaluation_pending)
            self._restore_best(state)
            if self._folder.recipe.exists():  # last, because all this may be retried
                add_resume(self._folder, recipe_name, recipe, {"after_step": state.step, **facts})
            else:
                write_recipe(self._folder, recipe_name, recipe, data, facts)

        self._launch.on_main_process(write, "describing the run")

    def append(self, record: dict[str, Any]) -> None:
        """Append a record to log.jsonl."""
        self._launch.on_main_process(lambda: self._folder.append(record), "writing the log")

    def write_list(self, path: Path, lines: Iterable[str]) -> None:
        """Write a text file of these lines; without lines only if the file exists already."""
        text = "".join(f"{line}\n" for line in lines)

        def write() -> None:
            if text or path.exists():  # asked on the main process alone: the others may see the folder later
                files.write_text(path, text)

        self._launch.on_main_process(write, f"writing {path.name}")

    def save_checkpoint(self, state: TrainState, groups: Mapping[str, TensorGroup]) -> None:
        """Write the checkpoint of `state`, then delete those that are no longer needed.

        Raises:
            UserError: also if a weight is not finite; nothing is written then.
        """

        def write() -> None:
            tensors = {name: group.tensors() for name, group in groups.items()}
            weights = {**tensors["model"], **tensors.get("ema", {})}
            if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
                raise UserError(
                    f"after step {state.step:,} {broken[0]} is not finite and was not saved; try a lower --lr in "
                    "another --output-dir"
                )
            save_checkpoint(self._folder.checkpoints, state, tensors)
            self._damaged.discard(state.step)
            self._prune(state)

        self._launch.on_main_process(write, "writing a checkpoint")

    def finish_epoch(self, state: TrainState, evaluation: Evaluation, model: ResNet, title: str, is_best: bool) -> None:
        """Publish `model` if it is the best so far, draw the curves, and add both to the checkpoint.

        In this order, after the epoch's record: a run killed in between rolls back all of it when it is resumed.
        """

        def write() -> None:
            if is_best:
                save_weights(weights_to_save(model), self._folder.weights)
                state.best_evaluation = evaluation.to_json(files.sha256_of(self._folder.weights))
                files.write_json(self._folder.evaluation, state.best_evaluation)
            figure = draw_curves(self._folder.records(), title, evaluation.counts["top_k"])
            for suffix in (".svg", ".png"):
                save_figure(figure, self._folder.curves.with_suffix(suffix))
            self._shown = show_in_notebook(figure, self._shown)
            rewrite_state(self._folder.checkpoints, state)
            self._prune(state)

        self._launch.on_main_process(write, "publishing the best weights and drawing the curves")

    def _restore_best(self, state: TrainState) -> None:
        """Roll back the publication of an epoch that the checkpoint does not contain, after a kill at that moment."""
        best, weights = state.best_evaluation, self._folder.weights
        if best is None:
            return
        if not _has_sha256(weights, best["weights_sha256"]):
            group = f"{best.get('weights', 'model')}.safetensors"
            kept = checkpoint_folder(self._folder.checkpoints, state.best_step) / group
            if not _has_sha256(kept, best["weights_sha256"]):
                return  # the published weights stay until the repeated epoch publishes them again
            files.write_atomically(weights, lambda path: shutil.copyfile(kept, path))
        files.write_json(self._folder.evaluation, best)

    def _prune(self, state: TrainState) -> None:
        prune_checkpoints(self._folder.checkpoints, self._keep_checkpoints, state.best_step, self._damaged)


def _has_sha256(file: Path, sha256: str) -> bool:
    return file.is_file() and files.sha256_of(file) == sha256
