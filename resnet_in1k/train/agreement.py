"""Before the first step, all processes compare what they run, on what: an unequal launch must not train."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from resnet_in1k.data.dataset import Source, sample_sums
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, provenance
from resnet_in1k.train.options import TrainOptions
from resnet_in1k.utils import files
from resnet_in1k.utils.distributed import Launch, local_rank
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import duration

MAX_CLOCK_DIFFERENCE_SECONDS = 60.0
"""More would make file times, logs and time-outs of the machines contradict one another."""
OF_ONE_MACHINE = ("workers", "cpu_threads")
"""Options that may differ between machines."""
COMPARED_IMAGES = 64
"""Of each split. All machines take the main process's list; a file that is missing elsewhere stops the run by name."""
VISIBLE_WITHIN_SECONDS = 10.0
"""A network file system may show a new file that much later."""


def check_same_program(launch: Launch, recipe: Recipe, options: TrainOptions, folder: RunFolder) -> None:
    """Compare commit, library versions, recipe, options, recipe.json and clock.

    Raises:
        UserError: on all processes, naming the first machine that differs from the main process's.
    """
    if launch.world_size == 1:
        return
    shared_options = {
        name: str(value) for name, value in dataclasses.asdict(options).items() if name not in OF_ONE_MACHINE
    }
    made_by = provenance()
    facts: dict[str, Any] = {
        "commit": made_by["commit"],
        **{f"version of {name}": version for name, version in made_by["versions"].items()},
        **{f"recipe field {name}": value for name, value in dataclasses.asdict(recipe).items()},
        **{f"option --{name.replace('_', '-')}": value for name, value in shared_options.items()},
        f"{folder.recipe}": files.sha256_of(folder.recipe) if folder.recipe.exists() else "no such file",
    }
    launch.gather(None, "starts")  # the clocks are then read at the same time
    everyone = launch.gather((launch.machine, time.time(), facts), "starts")
    main_machine, main_clock, main_facts = everyone[0]
    for rank, (machine, clock, theirs) in enumerate(everyone):
        who = f"process {rank} on {machine}"
        for name in main_facts:
            if theirs.get(name) != main_facts[name]:
                raise UserError(
                    f"{who} differs from process 0 on {main_machine}: {name} is {theirs.get(name)} there, "
                    f"{main_facts[name]} here; all processes need the same program, command and run folder"
                )
        if abs(clock - main_clock) > MAX_CLOCK_DIFFERENCE_SECONDS:
            raise UserError(
                f"the clocks of {machine} and {main_machine} differ by {duration(abs(clock - main_clock))}; "
                "set them by NTP"
            )


def check_same_data(launch: Launch, sources: Sequence[Source]) -> None:
    """Compare a sample of the images' bytes, machine by machine.

    Raises:
        UserError: on all processes, naming the first machine and image that differ from the main process's.
    """
    if launch.world_size == 1:
        return
    sums: dict[str, str] = {}
    if local_rank() == 0:
        for source in sources:
            sums.update(sample_sums(source, COMPARED_IMAGES))
    everyone = launch.gather((launch.machine, sums), "reads some images")
    main_machine, main_sums = everyone[0]
    for machine, theirs in everyone:
        for name in theirs:
            if theirs[name] != main_sums[name]:
                raise UserError(
                    f"{machine} sees other data than {main_machine}: {name} has the sha256 {main_sums[name]} on "
                    f"{main_machine}, on {machine} {theirs[name]}; all machines need the same files at this path"
                )


def check_run_folder_is_shared(launch: Launch, folder: RunFolder) -> None:
    """Whether all machines see the run folder that the main process has just locked.

    Only that one writes to it, but all read checkpoints from it, and after a requeue any machine may be the first.

    Raises:
        UserError: on all processes, naming the first machine that does not see it.
    """
    if launch.world_size == 1:
        return
    written = launch.broadcast_from_main(lambda: _lock_text(folder), "has locked the run folder")
    deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
    while (seen := _lock_text(folder)) != written and time.monotonic() < deadline:
        time.sleep(0.5)
    everyone = launch.gather((launch.machine, seen == written), "looks at the run folder")
    for machine, visible in everyone:
        if not visible:
            raise UserError(
                f"{machine} does not see the run folder {folder.path} of {everyone[0][0]}; put it on storage that all "
                "machines share, and start all of them in the same folder"
            )


def _lock_text(folder: RunFolder) -> str:
    try:
        return folder.lock.read_text(encoding="utf-8")
    except OSError:
        return ""
