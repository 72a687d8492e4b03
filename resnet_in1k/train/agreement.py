"""Comparison of all processes before the first step: an unequal launch must not train."""

import dataclasses
import time
from typing import Any

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


def check_same_program(launch: Launch, recipe: Recipe, options: TrainOptions, folder: RunFolder) -> None:
    """Compare commit, library versions, recipe, options, recipe.json and clock of all processes.

    Raises:
        UserError: on all processes, naming the first machine that differs from the main process's.
    """
    if launch.world_size == 1:
        return
    made_by, values = provenance(), dataclasses.asdict(options)
    own: dict[str, Any] = {
        "commit": made_by["commit"],
        **{f"version of {name}": version for name, version in made_by["versions"].items()},
        **{f"recipe field {name}": value for name, value in dataclasses.asdict(recipe).items()},
        **{
            f"option --{name.replace('_', '-')}": str(value)
            for name, value in values.items()
            if name not in OPTIONS_OF_ONE_MACHINE
        },
        f"{folder.recipe}": files.sha256_of(folder.recipe) if folder.recipe.exists() else "no such file",
    }
    launch.wait_for_everyone("starting")  # so that the clocks are read at the same time
    everyone = launch.gather((launch.machine, time.time(), own), "starting")
    main_machine, main_clock, main = everyone[0]
    for rank, (machine, clock, other) in enumerate(everyone):
        for name in main:
            if other.get(name) != main[name]:
                raise UserError(
                    f"process {rank} on {machine} differs from process 0 on {main_machine}: {name} is "
                    f"{other.get(name)} there, {main[name]} here; all processes need the same program, command and run "
                    "folder"
                )
        if abs(clock - main_clock) > MAX_CLOCK_DIFFERENCE_SECONDS:
            raise UserError(
                f"the clocks of {machine} and {main_machine} differ by {duration(abs(clock - main_clock))}; set them "
                "by NTP"
            )


def check_same_data(launch: Launch, sources: tuple[Source, Source]) -> None:
    """Compare the bytes of a sample of images on all machines.

    Raises:
        UserError: on all processes, naming the first machine and image that differ from the main process's.
    """
    if launch.world_size == 1:
        return
    sums: dict[str, str] = {}
    if local_rank() == 0:  # one process of each machine
        for source in sources:
            sums.update(sample_sums(source, COMPARED_IMAGES))
    everyone = launch.gather((launch.machine, sums), "reading images")
    main_machine, main = everyone[0]
    for machine, other in everyone:
        for name in other:
            if other[name] != main[name]:
                raise UserError(
                    f"{machine} has different data from {main_machine}: {name} has the sha256 {main[name]} on "
                    f"{main_machine}, {other[name]} on {machine}; all machines need the same files at this path"
                )


def check_run_folder_is_shared(launch: Launch, folder: RunFolder) -> None:
    """Check that all machines see the run folder, which the main process has just locked.

    Only the main process writes to it, but all read checkpoints from it, and after a requeue any machine may be the
    first.

    Raises:
        UserError: on all processes, naming the first machine that does not see it.
    """
    if launch.world_size == 1:
        return

    def lock_text() -> str:
        try:
            return folder.lock.read_text(encoding="utf-8")
        except OSError:
            return ""

    written = launch.broadcast_from_main(lock_text, "locking the run folder")
    deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
    while (seen := lock_text()) != written and time.monotonic() < deadline:
        time.sleep(0.5)
    everyone = launch.gather((launch.machine, seen == written), "reading the run folder")
    for machine, visible in everyone:
        if not visible:
            raise UserError(
                f"{machine} does not see the run folder {folder.path} of {everyone[0][0]}; put it on storage that all "
                "machines share, and start all of them in the same folder"
            )
