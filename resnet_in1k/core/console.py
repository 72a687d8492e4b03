"""Lines and a progress bar on the terminal."""

import sys
from typing import Any

from tqdm.auto import tqdm


class Console:
    """Prints on the main process only."""

    def __init__(self, is_main_process: bool):
        self._is_main_process = is_main_process

    def print(self, text: str) -> None:
        """Print to standard output, above any progress bar."""
        if self._is_main_process:
            tqdm.write(text)
            sys.stdout.flush()  # so that a log file shows it now, not when a block is full

    def bar(self, total: int, description: str, done: int = 0) -> "tqdm[Any]":
        """A progress bar on standard error, shown in a terminal or a notebook only."""
        interactive = sys.stderr.isatty() or in_notebook()
        return tqdm(
            total=total,
            initial=done,
            desc=description,
            leave=False,
            dynamic_ncols=True,
            disable=not (self._is_main_process and interactive),
        )


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this; nothing is imported to find out."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return bool(shell) and hasattr(shell, "kernel")
