"""What a training leaves in its run folder: one process writes it, the others wait, and fail with it if it cannot."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from resnet_in1k import files
from resnet_in1k.checkpoint import (
    TrainState,
    list_checkpoints,
    optimizer_tensors,
    prune_checkpoints,
    recover_checkpoints,
    save_checkpoint,
    save_state_anew,
    save_weights,
)
from resnet_in1k.errors import UserError, first_line
from resnet_in1k.evaluation import Evaluation
from resnet_in1k.model import ResNet, weights_to_save
from resnet_in1k.plots import LiveFigure, draw_curves, save_curves
from resnet_in1k.recipes import Recipe
from resnet_in1k.run_folder import RunFolder, RunLock, write_recipe, write_resumed

SAVED_IS_INTACT = "; what was saved before is intact: mend that and go on with --resume"
NOTHING_BEGUN = ""


class RunWriter:
    """All processes call each method alike, with the same arguments; the main process writes.

    Raises:
        UserError: on all processes, if the main process cannot write; what was there before is intact then.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator, keep_checkpoints: int, say: Callable[[str], None]):
        self._folder, self._accelerator, self._keep_checkpoints = folder, accelerator, keep_checkpoints
        self._say = say
        self._passed_over: set[int] = set()
        """Steps of checkpoints that were found damaged when the run was resumed."""
        self._lock: RunLock | None = None
        self._live_figure = LiveFigure()

    def on_main_process(self, write: Callable[[], None], advice: str = SAVED_IS_INTACT) -> None:
        """Let the main process write while the others wait; if it cannot, all of them fail together, with `advice`.

        What fails in passing, as network file systems do, is tried once more.
        """
        problem = [""]
        if self._accelerator.is_main_process:
            problem = [files.why_not(write) or ""]
        if self._accelerator.num_processes > 1:
            broadcast_object_list(problem)
        if problem[0]:
            raise UserError(problem[0] + advice)

    def take_possession(self) -> None:
        """Make the folder this process's own until it ends, and clear away what a killed run has left half done."""

        def take() -> None:
            self._folder.create()
            if self._lock is None:  # this may be a second try, and a second lock would let go of the first
                self._lock = RunLock(self._folder)
            files.remove_temporaries(self._folder.path)
            recover_checkpoints(self._folder.checkpoints)

        self.on_main_process(take, NOTHING_BEGUN)

    def begin(
        self,
        state: TrainState,
        recipe_name: str,
        recipe: Recipe,
        data: dict[str, Any],
        session: dict[str, Any],
        *,
        verdict_pending: bool,
    ) -> None:
        """Describe the run, or that it goes on after `state`; what was written later than that is taken back."""

        def write() -> None:
            self._passed_over = {step for step, _ in list_checkpoints(self._folder.checkpoints) if step > state.step}
            self._folder.forget_after(state.step, verdict_pending)
            self._restore_best(state)
            if self._folder.recipe.exists():  # last, as all this may be tried twice
                write_resumed(self._folder, recipe_name, recipe, {"after_step": state.step, **session})
            else:
                write_recipe(self._folder, recipe_name, recipe, data, **session)

        self.on_main_process(write)

    def record(self, record: dict[str, Any]) -> None:
        """Add a line to log.jsonl, and tell the trackers."""
        self.on_main_process(lambda: self._folder.append(record))
        values = {key: value for key, value in record.items() if key != "kind"}
        self._tell_trackers(lambda: self._accelerator.log(values, step=record["step"]))

    def start_trackers(self, config: dict[str, Any]) -> None:
        """Raises UserError if one cannot be started, as without a login."""
        problem = ""
        try:
            self._accelerator.init_trackers(self._folder.path.name, config=config)
        except Exception as error:  # each tracker has errors of its own
            problem = f"--report-to: the tracker cannot be started ({first_line(error)}); mend that, or leave it out"
        if problems := [each for each in gather_object([problem]) if each]:
            raise UserError(problems[0])

    def finish_trackers(self) -> None:
        for tracker in self._accelerator.trackers:
            self._tell_trackers(tracker.finish)
        self._accelerator.trackers = []

    def _tell_trackers(self, tell: Callable[[], None]) -> None:
        """What is far away may be unwell: it is left out then, and the run goes on, as log.jsonl has everything."""
        try:
            tell()
        except Exception as error:
            names = ", ".join(tracker.name for tracker in self._accelerator.trackers)
            self._accelerator.trackers = []
            self._say(f"{names} has failed, and is left out from here on ({first_line(error)})")

    def write_list(self, path: Path, lines: Iterable[str]) -> None:
        """A text file of those lines; none of no lines, unless there is one already."""
        text = "".join(f"{line}\n" for line in lines)

        def write() -> None:
            if text or path.exists():
                files.write_text(path, text)

        self.on_main_process(write)

    def save_checkpoint(self, state: TrainState, model: ResNet, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint of `state`, then delete those that are no longer needed.

        Raises:
            UserError: also if a weight is not finite.
        """

        def write() -> None:
            weights = weights_to_save(model)
            if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
                raise UserError(
                    f"after step {state.step:,} {broken[0]} is not finite, and was not saved; try a lower --lr in "
                    "another --output-dir"
                )
            save_checkpoint(self._folder.checkpoints, state, weights, optimizer_tensors(model, optimizer))
            self._passed_over.discard(state.step)
            self._prune(state)

        self.on_main_process(write)

    def finish_epoch(self, state: TrainState, evaluation: Evaluation, model: ResNet, title: str) -> None:
        """After the epoch's record: publish `model` if it is the best so far, draw the curves, note both in the state.

        In this order, so that a run killed in between takes all of it back when it resumes, and does it again.
        """
        best_so_far = evaluation.top1_accuracy > state.best_top1_accuracy
        if best_so_far:
            state.best_step, state.best_top1_accuracy = state.step, evaluation.top1_accuracy

        def write() -> None:
            if best_so_far:
                save_weights(weights_to_save(model), self._folder.weights)
                state.best_evaluation = evaluation.to_json(files.sha256_of(self._folder.weights))
                files.write_json(self._folder.evaluation, state.best_evaluation)
            figure = draw_curves(self._folder.records(), title, evaluation.top_k)
            save_curves(figure, self._folder.curves)
            self._live_figure.show(figure)
            save_state_anew(self._folder.checkpoints, state)
            self._prune(state)

        self.on_main_process(write)

    def _restore_best(self, state: TrainState) -> None:
        """Undo the publication of an epoch that the checkpoint does not know of, as after a kill just then."""
        best, weights = state.best_evaluation, self._folder.weights
        if best is None:
            return
        if not is_that(weights, best["weights_sha256"]):
            kept = self._folder.checkpoints / f"step_{state.best_step:08d}" / weights.name
            if not is_that(kept, best["weights_sha256"]):
                return  # what is published stays until the epoch, done again, publishes it again
            files.write_atomically(weights, lambda path: shutil.copyfile(kept, path))
        files.write_json(self._folder.evaluation, best)

    def _prune(self, state: TrainState) -> None:
        prune_checkpoints(self._folder.checkpoints, self._keep_checkpoints, state.best_step, self._passed_over)


def is_that(file: Path, sha256: str) -> bool:
    """Whether it is there, with just that content."""
    return file.is_file() and files.sha256_of(file) == sha256
