"""What the scripts share: from arguments to a call, from an error to one line and an exit status."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from resnet_in1k.utils.errors import Preempted, ProcessError, UserError
from resnet_in1k.utils.format import printable

T = TypeVar("T")

BAD_INPUT = 2
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
INTERRUPTED = 130
BROKEN_PIPE = 141
"""As a shell reports a program that SIGPIPE ended."""


def run_script(main: Callable[[], Any]) -> None:
    """Call `main`; a UserError becomes one line on standard error and exit status 2, Preempted one and 75."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that are no UTF-8
    try:
        try:
            _run(main)
        finally:
            sys.stdout.flush()  # here, where its error can be handled
    except BrokenPipeError:  # the reader of our output has ended, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _run(main: Callable[[], Any]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    def main_with_short_traceback() -> None:
        try:
            main()
        except (UserError, Preempted) as error:
            raise type(error)(str(error)) from None

    try:
        record(main_with_short_traceback)()  # a launcher of several processes repeats the reason in its own report
    except UserError as error:
        if _speaks_for_its_machine() or isinstance(error, ProcessError):
            _fail(str(error))
        sys.exit(BAD_INPUT)
    except Preempted as stopped:
        if is_main_process():
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def parse(cls: type[T], default: T | None = None, description: str | None = None) -> T:
    """Command-line arguments to a dataclass; flags, types and help are those of its fields.

    A wrong argument ends the program with one line that names it and, if there is one, the flag that was meant.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options = {} if default is None else {"default": default}
            return tyro.cli(cls, description=description, config=(tyro.conf.OmitArgPrefixes,), **options)
    except SystemExit as exit_:
        if exit_.code:
            if is_main_process():
                _fail(_one_line(errors.getvalue()))
            sys.exit(BAD_INPUT)
        raise


def value_of_flag(flag: str, default: str) -> str:
    """The value of one flag, read before the parser is built, whose defaults depend on it."""
    arguments = sys.argv[1:]
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:  # the parser takes both
            if equals:
                default = value
            elif place + 1 < len(arguments):
                default = arguments[place + 1]
    return default


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _speaks_for_its_machine() -> bool:
    """Its first process: what is wrong on one machine alone must be printed there, and once."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _fail(message: str) -> None:
    # A message may quote a file from elsewhere.
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)


def _one_line(boxed: str) -> str:
    """tyro's error box without its frame and its pointer to the help."""
    lines = [re.sub(r"[╭╮╰╯│─]+", " ", line).strip() for line in boxed.splitlines()[1:]]
    kept = [line for line in lines if line and not line.startswith("For full helptext")]
    return re.sub(r"\s+", " ", " ".join(kept)) + " (see --help)"
