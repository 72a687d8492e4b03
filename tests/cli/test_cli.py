"""Parsing of arguments, errors and exit statuses, and the commands of `python -m resnet_in1k`."""

import importlib
import inspect
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from helpers.processes import ROOT

from resnet_in1k.__main__ import COMMANDS, main, options_of
from resnet_in1k.augment.auto_augment import POLICIES
from resnet_in1k.cli import arguments as cli
from resnet_in1k.optim.losses import LOSSES
from resnet_in1k.optim.lr import LR_SCHEDULES
from resnet_in1k.optim.optimizers import OPTIMIZERS
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.errors import Preempted, ProcessError, UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure something.

    Examples:
        {prog} --ckpt runs/tutorial a.jpg
    """

    GROUPS: ClassVar = {"ckpt": "Weights", "size": "Images"}
    BASIC: ClassVar = ("ckpt", "size")

    ckpt: str
    """Weights, which may
    be 100% ours."""
    size: int = 3
    """Side in pixels."""
    mean: tuple[float, float, float] | None = None
    """Mean color."""
    keeps_size: bool = True
    """Keep the size."""
    images: tuple[Path, ...] = field(default=(), metadata=cli.POSITIONAL)
    """Images."""


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def parse(monkeypatch: pytest.MonkeyPatch, *words: str) -> Options:
    monkeypatch.setattr(sys, "argv", ["scripts/measure.py", *words])
    return cli.parse(Options)


def test_fields_are_flags(monkeypatch: pytest.MonkeyPatch):
    assert parse(monkeypatch, "--ckpt", "x") == Options(ckpt="x")
    words = ["a.jpg", "--ckpt=x", "--mean", "0", ".5", "1", "--no_keeps_size", "--size", "4", "b.jpg"]
    expected = Options(ckpt="x", size=4, mean=(0, 0.5, 1), keeps_size=False, images=(Path("a.jpg"), Path("b.jpg")))
    assert parse(monkeypatch, *words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt", "x", "--size", "x"], "--size: invalid int value: 'x'; see --help"),
        (["--ckpt", "x", "--sise=4"], "unknown flag --sise=4; did you mean --size?"),
        (["--ckpt", "x", "--qqqq"], "unknown flag --qqqq; see --help"),
        (["a.jpg"], "--ckpt is missing; for example:  python scripts/measure.py --ckpt runs/tutorial a.jpg"),
    ],
)
def test_wrong_flag_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, words: list[str], message: str):
    with pytest.raises(UserError) as refused:
        parse(monkeypatch, *words)
    assert str(refused.value) == message


def test_short_and_complete_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    texts = []
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse(monkeypatch, word)
        texts.append(capsys.readouterr().out)
    short, complete = texts
    assert "Weights, which may be 100% ours." in short
    assert "Side in pixels. (default: 3)" in short
    assert "--mean" not in short
    assert "--mean X X X" in complete
    for text in texts:
        assert text.startswith("usage: python scripts/measure.py [FLAGS]\n\nMeasure something.\n\nWeights:\n")
        assert text.endswith("examples:\n  python scripts/measure.py --ckpt runs/tutorial a.jpg\n")


def test_help_lists_the_names_of_each_table():
    """The tables are not imported for the help."""
    texts = cli.field_help(Recipe)
    for field_name, table in (
        ("optimizer", OPTIMIZERS),
        ("loss", LOSSES),
        ("lr_schedule", LR_SCHEDULES),
        ("augment_policy", POLICIES),
    ):
        assert set(table) <= set(re.findall(r"\w+", texts[field_name]))


def test_every_flag_has_a_group_a_help_and_an_example():
    for name in COMMANDS:
        options = options_of(name)
        assert inspect.getdoc(options).partition("Examples:\n")[2].count("{prog}") == 3
        for cls in cli.option_classes(options):
            texts = cli.field_help(cls)
            for title, each in cli.grouped_fields(cls):
                assert title
                assert re.fullmatch(r"\S.*[.)]", texts[each.name]), each.name


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
    out = capsys.readouterr().out
    assert re.findall(r"^  ([\w-]+) +\S.*\.$", out, re.M) == list(COMMANDS)
    assert run("push-to-hub", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: resnet-in1k push-to-hub")
    assert run("trian") == 2
    assert capsys.readouterr().err == f"error: no command 'trian'; the commands are {', '.join(COMMANDS)}\n"
    assert run("evaluate", "--ckpt", "nowhere") == 2
    assert capsys.readouterr().err.startswith("error: nowhere: no such file or folder")
    assert run("evaluate") == 2
    assert "for example:  resnet-in1k evaluate --ckpt runs/tutorial\n" in capsys.readouterr().err
