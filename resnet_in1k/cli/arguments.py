"""The command line: flags from dataclasses, and errors as one line with an exit status.

Each field of an options class is a flag, and the text below the field is its help. Attributes of the class, all
optional: `GROUPS`, titles of groups of flags by their first fields; `BASIC`, the fields that `--help` shows, while
`--help-all` shows all; `DEFAULTS_VARY`, True if another flag decides the defaults. The lines after `Examples:` in the
docstring are printed below the flags, with the command in place of `{prog}`.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import itertools
import os
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from resnet_in1k.utils.errors import Preempted, ProcessError, UserError
from resnet_in1k.utils.format import printable
from resnet_in1k.utils.process import local_rank, program, rank

T = TypeVar("T")

POSITIONAL = {"positional": True}
"""Metadata of a field whose values are given without a flag."""
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def run_script(main: Callable[[], Any]) -> None:
    """Call `main`. UserError becomes one line on standard error and exit status 2, Preempted one line and status 75."""

    def main_with_short_traceback() -> None:
        try:
            main()
        except (UserError, Preempted) as error:
            raise type(error)(str(error)) from None

    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # a launcher of several processes repeats the message in its own report
        from torch.distributed.elastic.multiprocessing.errors import record

        main_with_short_traceback = record(main_with_short_traceback)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        try:
            main_with_short_traceback()
        finally:
            sys.stdout.flush()  # here, where its error can be handled
    except UserError as error:
        # The first process of each machine prints: an error may concern one machine only.
        if local_rank() == 0 or isinstance(error, ProcessError):
            _print_error(str(error))
        sys.exit(2)
    except Preempted as stopped:
        if rank() == 0:
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(75)  # EX_TEMPFAIL of sysexits.h: try again later
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has ended, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as the shell reports a program that SIGPIPE has ended


def parse(cls: type[T]) -> T:
    """Parse the command line into an instance of `cls`.

    Raises:
        UserError: as parse_given does, and for values that contradict each other.
    """
    given = parse_given(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            own = {each.name: given[each.name] for each in dataclasses.fields(field.type) if each.name in given}
            values[field.name] = dataclasses.replace(field.default, **own)
        elif field.name in given:
            values[field.name] = given[field.name]
    return cls(**values)


def parse_given(cls: type) -> dict[str, Any]:
    """Return the values that the command line gives, by field of `cls` and of the dataclasses in it.

    Raises:
        UserError: for an unknown flag, naming the nearest one, for a missing flag, with an example, or a wrong value.
    """
    words = [_with_dashes(word) for word in sys.argv[1:]]
    given, unknown = _make_parser(cls, shows_all="--help-all" in words).parse_known_intermixed_args(words)
    for word in unknown:
        if not word.startswith("-"):
            raise UserError(f"unexpected argument {word}; see --help")
        known = [flag(field.name) for each in option_classes(cls) for field in dataclasses.fields(each)]
        nearest = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        raise UserError(f"unknown flag {word}; " + (f"did you mean {nearest[0]}?" if nearest else "see --help"))
    for field in dataclasses.fields(cls):
        is_flag = not dataclasses.is_dataclass(field.type) and "positional" not in field.metadata
        if is_flag and field.default is dataclasses.MISSING and not hasattr(given, field.name):
            raise UserError(f"{flag(field.name)} is missing; for example:  {_examples(cls)[0]}")
    return vars(given)


def flag(field_name: str) -> str:
    return f"--{field_name.replace('_', '-')}"


def field_help(cls: type) -> dict[str, str]:
    """Return the text below each field of a dataclass and its base classes as one paragraph, by field."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def grouped_fields(cls: type) -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield (title of the group, field) for each flag of one class, in order."""
    title = "Flags"
    for field in dataclasses.fields(cls):
        title = getattr(cls, "GROUPS", {}).get(field.name, title)
        if not dataclasses.is_dataclass(field.type):
            yield title, field


def option_classes(cls: type) -> list[type]:
    """Return the class and the dataclasses among its fields."""
    return [cls, *(field.type for field in dataclasses.fields(cls) if dataclasses.is_dataclass(field.type))]


def _command() -> str:
    """Return `resnet-in1k COMMAND`, `python -m resnet_in1k COMMAND` or `python scripts/COMMAND.py`."""
    return program(Path(sys.argv[0].rpartition(" ")[2]).stem)


def _examples(cls: type) -> list[str]:
    lines = inspect.getdoc(cls).partition("Examples:\n")[2].splitlines()
    return [line.strip().replace("{prog}", _command()) for line in lines]


def _with_dashes(word: str) -> str:
    """Replace underscores in a flag: both spellings are accepted."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


def _make_parser(cls: type, shows_all: bool) -> argparse.ArgumentParser:
    description = inspect.getdoc(cls).partition("Examples:\n")[0].strip()
    parser = _Parser(
        usage=f"{_command()} [FLAGS]",
        description=description,
        epilog="\n  ".join(["examples:", *_examples(cls)]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for each in option_classes(cls):
        hints, texts, basic = get_type_hints(each), field_help(each), getattr(each, "BASIC", None)
        defaults_vary = getattr(each, "DEFAULTS_VARY", False)
        for title, field in grouped_fields(each):
            group = groups.setdefault(title, None) or parser.add_argument_group(title)
            groups[title] = group
            is_shown = shows_all or basic is None or field.name in basic
            help_text = texts[field.name].replace("%", "%%") if is_shown else argparse.SUPPRESS
            _add_flag(group, field, hints[field.name], help_text, defaults_vary)
    group = parser.add_argument_group("Help")
    group.add_argument("-h", "--help", action="help", help="Print the flags that most users need.")
    group.add_argument("--help-all", action="help", help="Print all flags.")
    return parser


def _add_flag(group: Any, field: dataclasses.Field, hint: Any, help_text: str, defaults_vary: bool) -> None:
    """Add a flag for a bool, int, float, str, Path or Literal, a tuple of one of these, or such a type or None."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not types.NoneType)
    if hint is bool and defaults_vary:
        group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, help=help_text)
        return
    if hint is bool:
        group.add_argument(flag(field.name), action="store_true", help=help_text)
        group.add_argument(flag(f"no_{field.name}"), dest=field.name, action="store_false", help=argparse.SUPPRESS)
        return
    has_default = not defaults_vary and field.default not in (dataclasses.MISSING, None, 0, "", ())
    if has_default and help_text is not argparse.SUPPRESS:
        help_text += f" (default: {field.default})"
    settings: dict[str, Any] = {"help": help_text}
    if get_origin(hint) is tuple:
        hint, *others = get_args(hint)
        settings |= {"nargs": "*" if others == [...] else 1 + len(others), "action": _StoreTuple}
    if get_origin(hint) is Literal:
        settings["choices"] = get_args(hint)
    else:
        settings |= {"type": hint, "metavar": METAVARS[hint]}
    if "positional" in field.metadata:
        group.add_argument(field.name, **{**settings, "metavar": field.name.upper()})
    else:
        group.add_argument(flag(field.name), **settings)


class _StoreTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _print_error(message: str) -> None:
    # A message may quote a file from elsewhere: no control characters.
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
