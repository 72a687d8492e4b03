"""Two machines on one: each with an address, a host name and a temporary folder of its own, where that is allowed."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.processes import ROOT, SLOW

CONFIG = "accelerate_configs/two_nodes.yaml"


@dataclass(frozen=True)
class Machine:
    rank: int
    name: str
    address: str
    main_address: str
    """Of the first machine."""
    main_port: int
    temporary: Path
    prefix: tuple[str, ...] = ()
    """Runs a command there."""

    def start(self, data: object, output: object, *more: object, cwd: Path = ROOT) -> "subprocess.Popen[str]":
        """`accelerate launch` of this machine's one of two processes, in a session of its own: all can be killed."""
        main = ("--main_process_ip", self.main_address, "--main_process_port", self.main_port)
        where = ("--machine_rank", self.rank, "--num_processes", 2, *main)
        launch = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", ROOT / CONFIG)
        train = (ROOT / "scripts/train.py", *SLOW, "--cpu-threads", 1, "--data", data, "--output-dir", output, *more)
        return subprocess.Popen(
            [str(word) for word in (*self.prefix, *launch, *where, *train)],
            cwd=cwd,
            env={**os.environ, "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@contextlib.contextmanager
def two_machines(folder: Path, main_port: int) -> Iterator[tuple[Machine, Machine]]:
    """In network namespaces, joined by a pair of virtual interfaces; without the right to make them, on loopback."""
    names = [f"m{os.getpid()}{letter}" for letter in "ab"]
    namespaces = _make_namespaces(names)
    addresses = ["10.213.0.1", "10.213.0.2"] if namespaces else ["127.0.0.1"] * 2
    machines = []
    for rank, name in enumerate(names):
        temporary = folder / f"tmp_{rank}"
        temporary.mkdir()
        rename = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name)
        prefix = ("ip", "netns", "exec", name, *rename) if namespaces else ()
        host = name if namespaces else os.uname().nodename
        machines.append(Machine(rank, host, addresses[rank], addresses[0], main_port, temporary, prefix))
    try:
        yield machines[0], machines[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _make_namespaces(names: list[str]) -> bool:
    if not (shutil.which("ip") and shutil.which("unshare")):
        return False
    a, b = names
    commands = [
        f"ip netns add {a}",
        f"ip netns add {b}",
        f"ip -n {a} link add eth0 type veth peer name eth0 netns {b}",
        f"ip -n {a} address add 10.213.0.1/24 dev eth0",
        f"ip -n {b} address add 10.213.0.2/24 dev eth0",
        *(f"ip -n {name} link set {interface} up" for name in names for interface in ("lo", "eth0")),
    ]
    return all(subprocess.run(command.split(), capture_output=True).returncode == 0 for command in commands)
