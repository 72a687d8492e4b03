"""Lines and a progress bar on the terminal."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from resnet_in1k.utils.format import duration

HEARTBEAT_SECONDS = 30.0


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
        """Make a progress bar on standard error, which is shown in a terminal or a notebook only."""
        interactive = sys.stderr.isatty() or in_notebook()
        return tqdm(
            total=total,
            initial=done,
            desc=description,
            leave=False,
            dynamic_ncols=True,
            disable=not (self._is_main_process and interactive),
        )


@contextlib.contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Print a line to standard error every 30 seconds, for slow work that shows no progress of its own."""
    ended, started_at = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            print(f"{what}: {duration(time.monotonic() - started_at)} so far", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # the next step may fork


def in_notebook() -> bool:
    """True if a Jupyter kernel runs this process; imports nothing."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return bool(shell) and hasattr(shell, "kernel")
