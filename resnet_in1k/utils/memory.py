"""How much memory this process may still take: what the machine has, within the limit of a container or a job."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that can be allocated before the machine swaps or a limit ends a process.

    Docker, Slurm and Kubernetes limit memory by cgroups, which psutil does not look at. A limit may be set on any
    group above this process's own.
    """
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """Bytes left in each group that has a limit, of cgroup version 1 or 2."""
    try:
        lines = OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.strip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(root):
                yield from _left_in(folder, *names)


def _left_in(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    # ValueError: "max" for no limit.
    with contextlib.suppress(OSError, ValueError):
        limit, usage = (int((folder / name).read_text(encoding="ascii")) for name in (limit_name, usage_name))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        # The page cache counts as used, but is dropped where memory is needed.
        yield max(0, limit - usage + int(statistics.get(cache_name, 0)))
