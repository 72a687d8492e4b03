"""Lines and progress bars on the terminal."""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from resnet_in1k.utils.process import rank

tqdm.monitor_interval = 0  # no thread of tqdm: workers are forked later


def print_line(text: str) -> None:
    """Print to standard output, above any progress bar, on the main process only."""
    if rank() == 0:
        with _terminal_may_be_lost():
            tqdm.write(text)
            sys.stdout.flush()  # a log file then shows the line now, not when a block is full


def bar_below_lines(total: int, description: str, done: int = 0) -> "tqdm[Any]":
    """Make a progress bar next to lines of a log: on the main process, in a terminal or a notebook only."""
    hidden = rank() != 0 or not _is_interactive()
    return _Bar(total=total, initial=done, desc=description, leave=False, dynamic_ncols=True, disable=hidden)


class _Bar(tqdm):
    def display(self, *arguments: Any, **options: Any) -> None:
        with _terminal_may_be_lost():
            super().display(*arguments, **options)


@contextlib.contextmanager
def _terminal_may_be_lost() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a line can be written just before SIGHUP arrives
        if error.errno != errno.EIO:
            raise
        replace_lost_terminal()


def replace_lost_terminal() -> None:
    """Send what is printed nowhere if it went to a terminal: once that is lost, a line of the log would be an error."""
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def progress_bar(total: int, description: str, unit: str = "images") -> "tqdm[Any]":
    """Make a progress bar on standard error; if that is a file, with a line every ten seconds."""
    seconds = 0.1 if _is_interactive() else 10.0
    return tqdm(total=total, desc=description, unit=f" {unit}", mininterval=seconds, delay=seconds, dynamic_ncols=True)


def in_notebook() -> bool:
    """True if a Jupyter kernel runs this process; imports nothing."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return bool(shell) and hasattr(shell, "kernel")


def _is_interactive() -> bool:
    # In a notebook a bar without ipywidgets, which tqdm imports if it can, would leave a line between those of the log.
    return sys.stderr.isatty() or (in_notebook() and "ipywidgets" in sys.modules)
