"""Lines and progress bars on the terminal."""

import sys
from typing import Any

from tqdm.auto import tqdm

tqdm.monitor_interval = 0  # no thread of tqdm: workers are forked later
LOG_FILE_SECONDS = 10.0
"""Time between two updates of a progress bar that is written to a file."""


class Console:
    """Print on the main process only."""

    def __init__(self, is_main_process: bool):
        self._is_main_process = is_main_process

    def print(self, text: str) -> None:
        """Print to standard output, above any progress bar."""
        if self._is_main_process:
            tqdm.write(text)
            sys.stdout.flush()  # a log file then shows the line now, not when a block is full

    def bar(self, total: int, description: str, done: int = 0) -> "tqdm[Any]":
        """Make a progress bar next to lines of a log: in a terminal or a notebook only."""
        shown = self._is_main_process and _is_interactive()
        return tqdm(total=total, initial=done, desc=description, leave=False, dynamic_ncols=True, disable=not shown)


def progress_bar(total: int, description: str, unit: str = "images", *, only_if_long: bool = False) -> "tqdm[Any]":
    """Make a progress bar on standard error, also if that is a file; with `only_if_long` it appears after ten
    seconds."""
    return tqdm(
        total=total,
        desc=description,
        unit=f" {unit}",
        mininterval=0.1 if _is_interactive() else LOG_FILE_SECONDS,
        delay=LOG_FILE_SECONDS if only_if_long else 0,
        dynamic_ncols=True,
        disable=total == 0,
    )


def in_notebook() -> bool:
    """True if a Jupyter kernel runs this process; imports nothing."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return bool(shell) and hasattr(shell, "kernel")


def _is_interactive() -> bool:
    return sys.stderr.isatty() or in_notebook()
