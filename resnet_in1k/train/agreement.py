"""Comparison of all processes before the first step: an unequal launch must not train."""

import time

from resnet_in1k.data.dataset import Source, sample_sums
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, provenance
from resnet_in1k.train.trainer import TrainOptions
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import duration
from resnet_in1k.utils.launch import Launch, local_rank

MAX_CLOCK_DIFFERENCE_SECONDS = 60.0
"""A larger difference would make file times, logs and time-outs of the machines contradict one another."""
OPTIONS_OF_ONE_MACHINE = ("workers", "cpu_threads")
"""Options that may differ between machines."""
COMPARED_IMAGES = 64
"""Images of each split that all machines must have with the same bytes. All use the main process's list."""
VISIBLE_WITHIN_SECONDS = 10.0
"""A network file system may show a new file that much later."""


def refuse_differences(launch: Launch, values: dict[str, str], doing: str, advice: str) -> None:
    """Compare values of all processes, by their names.

    Raises:
        UserError: on all processes, naming the first machine and value that differ from the main process's.
    """
    everyone = launch.gather((launch.machine, values), doing)
    main_machine, main = everyone[0]
    for machine, other in everyone:
        for name, value in other.items():
            if value != main.get(name):
                difference = f"{name}: {value} there, {main.get(name)} here"
                raise UserError(f"{machine} differs from {main_machine}: {difference}; {advice}")


def check_same_program(launch: Launch, recipe: Recipe, options: TrainOptions, folder: RunFolder) -> None:
    """Refuse differences in commit, library versions, recipe, options, recipe.json and clock."""
    if launch.world_size == 1:
        return
    made_by = provenance()
    values = {"commit": made_by["commit"], **made_by["versions"], **vars(recipe)}
    values |= {name: str(value) for name, value in vars(options).items() if name not in OPTIONS_OF_ONE_MACHINE}
    values[str(folder.recipe)] = files.sha256_of(folder.recipe) if folder.recipe.exists() else "missing"
    refuse_differences(launch, values, "starting", "all processes need the same program, command and run folder")
    everyone = launch.gather((launch.machine, time.time()), "starting")  # at the same time, after the exchange above
    main_machine, main_clock = everyone[0]
    for machine, clock in everyone:
        if (difference := abs(clock - main_clock)) > MAX_CLOCK_DIFFERENCE_SECONDS:
            raise UserError(
                f"the clocks of {machine} and {main_machine} differ by {duration(difference)}; set them by NTP"
            )


def check_same_data(launch: Launch, sources: tuple[Source, Source]) -> None:
    """Refuse differences in the bytes of a sample of images on all machines."""
    if launch.world_size > 1:
        compared = sources if local_rank() == 0 else ()  # by one process of each machine
        sums = {name: sha256 for source in compared for name, sha256 in sample_sums(source, COMPARED_IMAGES).items()}
        refuse_differences(launch, sums, "reading images", "all machines need the same files at this path")


def check_run_folder_is_shared(launch: Launch, folder: RunFolder) -> None:
    """Refuse machines that do not see the run folder, which the main process has just locked.

    Only the main process writes to it, but all read checkpoints from it, and after a requeue any machine may be the
    first.
    """
    if launch.world_size == 1:
        return

    def lock_text() -> str:
        try:
            return folder.lock.read_text(encoding="utf-8")
        except OSError:
            return "missing"

    written = launch.broadcast_from_main(lock_text, "locking the run folder")
    deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
    while (seen := lock_text()) != written and time.monotonic() < deadline:
        time.sleep(0.5)
    advice = "put the run folder on storage that all machines share, and start all of them in the same folder"
    refuse_differences(launch, {str(folder.lock): seen}, "reading the run folder", advice)
