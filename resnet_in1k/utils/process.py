"""This process: its place in the launch, as the launcher has set it, and the command that started it."""

import os
import sys


def world_size() -> int:
    """Number of processes of this launch on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def program(command: str) -> str:
    """Return the start of a command line, in the form in which this program was started."""
    start = sys.argv[0].rpartition(" ")[0]
    # The package's __main__.py has put one of these two there.
    return f"{start} {command}" if start in ("resnet-in1k", "python -m resnet_in1k") else f"python scripts/{command}.py"
