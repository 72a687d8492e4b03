import random
import re
import subprocess
import sys
import threading
import time

import pytest
from helpers.processes import ROOT
from helpers.threads import run_launch
from helpers.two_processes import run_two

from resnet_in1k.utils import launch
from resnet_in1k.utils.errors import ProcessError, UserError
from resnet_in1k.utils.launch import Launch


def test_value_of_the_main_process_reaches_all():
    made = []
    large = random.Random(0).randbytes(20 << 20)  # as the paths of two million images

    def body(launch: Launch) -> list[object]:
        return launch.on_main_process(lambda: made.append(launch.rank) or [launch.rank, large], "makes it")

    assert run_launch(body, body, body) == [[0, large]] * 3
    assert made == [0]


def test_gathered_values_are_in_order_and_do_not_mix():
    def body(launch: Launch) -> list[object]:
        return [launch.gather((name, launch.rank), "names it") for name in "ab"]

    assert run_launch(body, body) == [[[("a", 0), ("a", 1)], [("b", 0), ("b", 1)]]] * 2


def test_process_that_fails_alone_is_named_to_those_that_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "FAILURE_POLL_SECONDS", 0.1)

    def fails(launch: Launch) -> None:
        launch.machine = "node7"
        raise ProcessError("its disk is gone")

    waits, failed = run_launch(lambda launch: launch.gather(0, "adds up"), fails)
    assert str(failed) == "its disk is gone"
    assert type(waits) is ProcessError
    assert str(waits) == "stopped because process 1 on node7: its disk is gone"


def test_process_that_waits_long_says_for_what(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(launch, "REPORT_SECONDS", 0.1)
    reported = threading.Event()

    class Errors:
        def write(self, text: str) -> None:
            lines.append(text)
            reported.set()

    lines: list[str] = []
    monkeypatch.setattr(sys, "stderr", Errors())

    def body(launch: Launch) -> None:
        launch.machine = "node7"
        launch.on_main_process(lambda: reported.wait(30), "listing images")

    run_launch(body, body)
    assert lines[0] == "process 1 on node7: waiting for process 0 (listing images), 0 s"


def test_process_that_is_far_behind_stops_at_the_same_call():
    """The others have polled 300 times more when it asks, and find the same decision."""
    main_has_stopped = threading.Event()

    def main(launch: Launch) -> list[str]:
        answers = [launch.stop_requested("") for _ in range(300)] + [launch.stop_requested("SIGTERM")]
        main_has_stopped.set()
        return answers

    def slow(launch: Launch) -> list[str]:
        main_has_stopped.wait(30)
        return [launch.stop_requested("") for _ in range(301)]

    assert run_launch(main, slow) == [[""] * 300 + ["SIGTERM"]] * 2


def test_unreachable_main_process_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")  # discard: nobody listens there
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launch, "REPORT_SECONDS", 0.1)
    monkeypatch.setattr(launch, "CONNECT_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"^process 1 on \S+ cannot reach process 0 at 127\.0\.0\.1:9 \(.*firewall$"):
        Launch.connect()


BLOCKS = """
import os, sys, time
from resnet_in1k.utils import launch
launch.FAILURE_POLL_SECONDS, launch.FAILURE_SECONDS, sys.stderr = 0.1, 0.1, sys.stdout
with launch.Launch.connect() as this:
    print(this.store.underlying_store.timeout.total_seconds(), flush=True)
    this.end_with_others()
    this.gather(None, "starting")
    if this.rank == {rank}:
        this.store.wait(["blocked"])
        {ends}
    this.store.set("blocked", "")
    time.sleep(60)  # as in a collective of NCCL, which raises nothing
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "ends", "words"),
    [
        (1, "raise OSError('its disk is gone')", r"process 0 on .*: stopped because process 1 on .*: its disk is gone"),
        (0, "os._exit(9)", r"process 1 on .*: stopped because the connection to process 0 or its launcher is lost"),
    ],
    ids=["fails", "is killed"],
)
def test_process_that_a_collective_blocks_ends_with_the_others(rank: int, ends: str, words: str):
    started = time.monotonic()
    printed = run_two("-c", BLOCKS.format(rank=rank, ends=ends))
    assert time.monotonic() - started < 50
    store_seconds, line = printed[1 - rank].splitlines()
    assert float(store_seconds) == 1800  # NCCL meets in it, which one late process must not end
    assert re.fullmatch(words, line)


CONNECTS = """
import sys
from resnet_in1k.utils import launch
launch.FAILURE_POLL_SECONDS = 0.1
print("ready", flush=True)
launch.Launch.connect()
"""


@pytest.mark.slow
def test_process_that_connects_ends_with_its_launcher(tmp_path):
    """A launcher killed while its processes wait for others that never come must not leave them behind."""
    launcher = f"""
import os, subprocess, sys
environment = {{**os.environ, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "7"}}
meeting = {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}}
process = subprocess.Popen([sys.executable, "-c", {CONNECTS!r}], env={{**environment, **meeting}})
print(process.pid, flush=True)
process.wait()
"""
    import psutil

    running = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    process = psutil.Process(int(running.stdout.readline()))
    assert running.stdout.readline() == "ready\n"
    running.kill()
    _, alive = psutil.wait_procs([process], timeout=20)
    assert not alive
