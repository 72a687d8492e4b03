"""Parsing of arguments, errors and exit statuses, and the commands of `python -m resnet_in1k`."""

import importlib
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers.processes import ROOT

from resnet_in1k.__main__ import COMMANDS
from resnet_in1k.cli import arguments as cli
from resnet_in1k.utils.errors import BadImageError, Preempted, UserError


@dataclass
class Options:
    size: int = 3
    """How large."""


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


def test_wrong_argument_is_reported_by_the_main_process_only(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", "--size", "x"])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_:
        cli.parse(Options)
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_help_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        cli.parse(Options)
    assert exit_.value.code == 0
    assert "How large." in capsys.readouterr().out


def test_arguments_become_the_dataclass(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--size", "5"])
    assert cli.parse(Options) == Options(5)
    monkeypatch.setattr("sys.argv", ["script.py"])
    assert cli.parse(Options, default=Options(7)) == Options(7)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], "a"),
        (["--recipe", "b"], "b"),
        (["--x", "1", "--recipe=c"], "c"),
        (["--recipe"], "a"),
        (["--recipe", "b", "--recipe", "c"], "c"),  # the last one counts, as for the parser
    ],
)
def test_value_of_one_flag_is_known_before_parsing(monkeypatch, arguments: list, value: str):
    monkeypatch.setattr("sys.argv", ["script.py", *arguments])
    assert cli.value_of_flag("--recipe", default="a") == value


@pytest.mark.parametrize(
    ("rank", "error", "printed"),
    [
        ("0", UserError("the folder is gone"), "error: the folder is gone\n"),
        ("1", UserError("the folder is gone"), ""),  # the first process of the machine prints it
        ("1", BadImageError.about("a.jpg", "cut"), "error: a.jpg cannot be read as an image (cut);"),
    ],
)
def test_user_error_is_one_line_by_one_process(monkeypatch, capsys, rank: str, error: UserError, printed: str):
    monkeypatch.setenv("LOCAL_RANK", rank)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run_script(main)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(printed)
    assert err.count("\n") == bool(printed)


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (Preempted("stopped by SIGTERM; go on with --resume"), 75, "stopped by SIGTERM; go on with --resume\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_stopped_script_has_a_status_of_its_own(capsys, error: BaseException, status: int, printed: str):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run_script(main)
    assert exit_.value.code == status
    assert capsys.readouterr() == ("", printed)


def test_bug_keeps_its_traceback():
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run_script(main)


def piped_to(reader: str, program: str) -> subprocess.CompletedProcess[str]:
    """Its status is that of the program, not the reader's."""
    command = f"{sys.executable} {program} | {reader}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_help_can_be_piped_to_head():
    result = piped_to("head -1", "scripts/train.py --help")
    assert result.stdout.startswith("usage: scripts/train.py")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    assert result.returncode in (0, cli.BROKEN_PIPE)


@pytest.mark.slow
def test_output_that_nobody_reads_is_no_traceback():
    """`true` ends long before there is anything to read."""
    result = piped_to("true", "-c 'from resnet_in1k.cli.arguments import run_script; run_script(lambda: print(1))'")
    assert (result.returncode, result.stderr) == (141, "")


def test_an_error_cannot_write_to_the_terminal(capsys):
    """It may quote a file from elsewhere, and stays one line."""

    def fail() -> None:
        raise UserError("field \x1b]0;title\x07 of\nmine")

    with pytest.raises(SystemExit):
        cli.run_script(fail)
    assert capsys.readouterr().err == "error: field \\x1b]0;title\\x07 of\\nmine\n"


def test_every_script_is_a_command():
    assert {name.replace("-", "_") for name in COMMANDS} == {path.stem for path in (ROOT / "scripts").glob("*.py")}
    for name in COMMANDS:
        assert callable(importlib.import_module(f"resnet_in1k.cli.{name.replace('-', '_')}").main)


@pytest.mark.slow
def test_commands_of_the_package():
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "resnet_in1k", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    helped, unknown, failed = run(), run("trian"), run("evaluate", "--ckpt", "nowhere")
    assert (helped.returncode, unknown.returncode, failed.returncode) == (0, 2, 2)
    assert all(f"\n  {name} " in helped.stdout for name in COMMANDS)
    assert unknown.stderr.startswith("error: no command 'trian'\n")
    assert failed.stderr.startswith("error: nowhere: no such file or folder")
    assert run("push-to-hub", "--help").stdout.startswith("usage: resnet-in1k push-to-hub")
