from dataclasses import dataclass

import pytest

from resnet_in1k import cli
from resnet_in1k.errors import BadImageError, UserError


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
def test_a_wrong_argument_is_one_line_and_status_2(monkeypatch, capsys, arguments: list, parts: list):
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


def test_help_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        cli.parse(Options)
    assert exit_.value.code == 0
    assert "How large." in capsys.readouterr().out


def test_values_come_back(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--size", "5"])
    assert cli.parse(Options) == Options(5)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [([], "a"), (["--recipe", "b"], "b"), (["--x", "1", "--recipe=c"], "c"), (["--recipe"], "a")],
)
def test_one_flag_can_be_read_ahead(monkeypatch, arguments: list, value: str):
    monkeypatch.setattr("sys.argv", ["script.py", *arguments])
    assert cli.choice_ahead("--recipe", default="a") == value


@pytest.mark.parametrize(
    ("rank", "error", "printed"),
    [
        ("0", UserError("the folder is gone"), "error: the folder is gone\n"),
        ("1", UserError("the folder is gone"), ""),  # the first process of the machine says it
        ("1", BadImageError.about("a.jpg", "cut"), "error: a.jpg cannot be read as an image (cut);"),
    ],
)
def test_a_user_error_is_one_line_by_one_process(monkeypatch, capsys, rank: str, error: UserError, printed: str):
    monkeypatch.setenv("LOCAL_RANK", rank)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run_script(main)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(printed)
    assert err.count("\n") == bool(printed)


def test_a_bug_keeps_its_traceback():
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run_script(main)
