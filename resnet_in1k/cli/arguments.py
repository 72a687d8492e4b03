"""Shared by all commands: parsing, errors as one line and an exit status."""

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
from resnet_in1k.utils.launch import local_rank, rank

T = TypeVar("T")


def run_script(main: Callable[[], Any]) -> None:
    """Call `main`. UserError becomes one line on standard error and exit status 2, Preempted one line and status 75."""
    from torch.distributed.elastic.multiprocessing.errors import record

    def main_with_short_traceback() -> None:
        try:
            main()
        except (UserError, Preempted) as error:
            raise type(error)(str(error)) from None

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        try:
            record(main_with_short_traceback)()  # a launcher of several processes repeats the message in its own report
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


def parse(cls: type[T], default: T | None = None) -> T:
    """Parse the command line into a dataclass: its docstring is the description, its fields are the flags.

    A wrong argument ends the program with status 2 and one line, which names the argument and similar flags.
    """
    errors = io.StringIO()
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(cls, config=(tyro.conf.OmitArgPrefixes,), **options)
    except SystemExit as exit_:
        if exit_.code and rank() == 0:
            # tyro prints a box: keep its text, without the frame and the hint about --help.
            lines = [re.sub(r"[╭╮╰╯│─]+", " ", line).strip() for line in errors.getvalue().splitlines()[1:]]
            text = " ".join(line for line in lines if not line.startswith("For full helptext"))
            _print_error(re.sub(r"\s+", " ", text).strip() + " (see --help)")
        sys.exit(2 if exit_.code else 0)


def _print_error(message: str) -> None:
    # A message may quote a file from elsewhere: no control characters.
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
