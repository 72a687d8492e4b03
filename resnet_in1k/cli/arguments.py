"""Shared by all commands: parsing, errors as one line and an exit status, and the options of image preprocessing."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import tyro

from resnet_in1k.augment.normalize import RGB
from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.recipes.recipe import Interpolation, resize_size_for
from resnet_in1k.utils.errors import Preempted, ProcessError, UserError
from resnet_in1k.utils.format import printable
from resnet_in1k.utils.launch import local_rank, rank
from resnet_in1k.utils.validation import above, at_least

T = TypeVar("T")

BAD_INPUT = 2
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
INTERRUPTED = 130
BROKEN_PIPE = 141
"""Status that a shell reports for a program ended by SIGPIPE."""


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions:
    """Preprocessing of images; every default is that of the weights' own evaluation or config.json."""

    image_size: int | None = field(default=None, metadata=at_least(1))
    """Side of the center crop, in pixels; by default as the weights were evaluated."""
    eval_crop_ratio: float | None = field(default=None, metadata=above(0, at_most=1))
    """The short side is resized to image_size / this before the crop; by default as the weights were evaluated."""
    eval_interpolation: Interpolation | None = None
    """Interpolation of resizing; by default as the weights were evaluated."""
    mean: RGB | None = None
    """Mean of the RGB values from 0 to 1, subtracted by normalization; by default as the weights were evaluated."""
    std: RGB | None = None
    """Standard deviation that normalization divides by; by default as the weights were evaluated."""

    def change(self, recorded: EvalPreprocessing) -> EvalPreprocessing:
        changes = {"interpolation": self.eval_interpolation, "mean": self.mean, "std": self.std}
        found = recorded.at(self.image_size or recorded.image_size)
        if self.eval_crop_ratio:
            changes["resize_size"] = resize_size_for(found.image_size, self.eval_crop_ratio)
        return replace(found, **{name: value for name, value in changes.items() if value})


def run_script(main: Callable[[], Any]) -> None:
    """Call `main`. UserError becomes one line on standard error and exit status 2, Preempted one line and status 75."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        try:
            _run(main)
        finally:
            sys.stdout.flush()  # here, where its error can be handled
    except BrokenPipeError:  # the reader of the output has ended, as in `--help | head`
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
        record(main_with_short_traceback)()  # a launcher of several processes repeats the message in its own report
    except UserError as error:
        # The first process of each machine prints: an error may concern one machine only.
        if local_rank() == 0 or isinstance(error, ProcessError):
            _print_error(str(error))
        sys.exit(BAD_INPUT)
    except Preempted as stopped:
        if rank() == 0:
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


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
        sys.exit(BAD_INPUT if exit_.code else 0)


def _print_error(message: str) -> None:
    # A message may quote a file from elsewhere: no control characters.
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
