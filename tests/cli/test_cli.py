"""Parsing of arguments, errors and exit statuses, and the commands of `python -m resnet_in1k`."""

import importlib
import os
import sys
from dataclasses import dataclass

import pytest
from helpers.processes import ROOT

from resnet_in1k.__main__ import COMMANDS, main
from resnet_in1k.cli import arguments as cli
from resnet_in1k.utils.errors import Preempted, ProcessError, UserError


@dataclass
class Options:
    size: int = 3


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--size", "x"], ["--size", "'x'"]),
        (["--sizes", "4"], ["Unrecognized options: --sizes", "Perhaps you meant", "--size INT"]),
        (["4"], ["Unrecognized"]),
    ],
)
def test_wrong_argument_is_one_line_and_status_2(monkeypatch, capsys, arguments: list, parts: list):
    monkeypatch.setattr("sys.argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.parse(Options)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err

    monkeypatch.setenv("RANK", "1")  # only the main process prints it
    with pytest.raises(SystemExit) as exit_:
        cli.parse(Options)
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rank", "error", "printed"),
    [
        ("0", UserError("the folder is gone"), "error: the folder is gone\n"),
        ("1", UserError("the folder is gone"), ""),  # the first process of the machine prints it
        ("1", ProcessError("a worker died"), "error: a worker died\n"),
        # It may quote a file from elsewhere: one line, and no commands to the terminal.
        ("0", UserError("field \x1b]0;title\x07 of\nmine"), "error: field \\x1b]0;title\\x07 of\\nmine\n"),
    ],
)
def test_user_error_is_one_line_by_one_process(monkeypatch, capsys, rank: str, error: UserError, printed: str):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as exit_:
        cli.run_script(raising(error))
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(printed)
    assert err.count("\n") == bool(printed)


def test_stopped_script_has_a_status_of_its_own(capsys):
    for error, status in ((Preempted("stopped; resume with --resume"), 75), (KeyboardInterrupt("interrupted"), 130)):
        with pytest.raises(SystemExit) as exit_:
            cli.run_script(raising(error))
        assert exit_.value.code == status
        assert capsys.readouterr() == ("", f"{error}\n")


def test_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_script(raising(ZeroDivisionError()))


def test_output_that_nobody_reads_is_no_traceback(monkeypatch: pytest.MonkeyPatch):
    """As after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as exit_:
            cli.run_script(lambda: print(1))
    assert exit_.value.code == 141


def test_every_script_is_a_command():
    scripts = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py") if path.stem != "command"}
    assert {name.replace("-", "_") for name in COMMANDS} == scripts.keys()
    for name in COMMANDS:
        assert scripts[name.replace("-", "_")].endswith(f'command.run("{name}")\n')
        assert callable(importlib.import_module(f"resnet_in1k.cli.{name.replace('-', '_')}").main)


def test_commands_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["resnet_in1k", *words])
        try:
            return main() or 0
        except SystemExit as exit_:
            return exit_.code

    assert run() == 0
    assert ", ".join(COMMANDS) in capsys.readouterr().out
    assert run("push-to-hub", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: resnet-in1k push-to-hub")
    assert run("trian") == 2
    assert capsys.readouterr().err == f"error: no command 'trian'; the commands are {', '.join(COMMANDS)}\n"
    assert run("evaluate", "--ckpt", "nowhere") == 2
    assert capsys.readouterr().err.startswith("error: nowhere: no such file or folder")
