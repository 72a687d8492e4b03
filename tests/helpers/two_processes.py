"""Two processes of one launch on this machine's CPU, started without a launcher, which takes seconds itself."""

import os
import subprocess
import sys

from helpers.processes import ROOT, free_port


def run_two(*arguments: str) -> list[str]:
    """Run Python with these arguments as process 0 and as process 1, and return what each has printed."""
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = {**os.environ, **launch, "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    return [process.communicate(timeout=120)[0] for process in processes]
