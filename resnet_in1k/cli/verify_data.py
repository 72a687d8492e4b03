"""prepare_data.py --verify: decode all images, and list what is wrong with them."""

import csv
import io
import itertools
from collections.abc import Callable
from pathlib import Path

from resnet_in1k.data.dataset import FileSource, Source, Split
from resnet_in1k.data.registry import check_same_classes, open_source, open_whole
from resnet_in1k.prepare.verify import Problem, verify
from resnet_in1k.utils import files
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import is_below
from resnet_in1k.utils.format import count, printable
from resnet_in1k.utils.pool import Progress

SPLITS: tuple[Split, ...] = ("train", "val")


def verify_data(data: str, val_share: float, report: Path | None, processes: int, say: Callable[[str], None]) -> bool:
    """Say each problem, and write all to `report`; whether there are none.

    Args:
        val_share: if not 0, there need be no val split.

    Raises:
        UserError: if nothing can be opened, or the report not be written.
    """
    sources, problems = _what_opens(data, val_share)
    for source in sources:
        if report is not None and isinstance(source, FileSource) and is_below(report, source.folder):
            raise UserError(f"--report: {report} would lie among the images; choose another place")
    _write_report(report, [])  # fails before the images are decoded, not after
    found: list[Problem] = []
    for problem in itertools.chain(problems, verify(sources, processes, Progress())):
        found.append(problem)
        say(printable(f"{problem.kind}: {problem.image} ({problem.detail})"))
    for source in sources:
        if source.note:
            say(source.note)
    _write_report(report, found)
    if report is not None:
        say(f"written to {report}")
    total = sum(map(len, sources))
    say(f"{data}: {total:,} images, " + (f"{count(len(found), 'problem')}" if found else "all whole"))
    return not found


def _write_report(report: Path | None, problems: list[Problem]) -> None:
    """Raises UserError if it cannot be written."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Problem._fields, *problems])
    if report is not None and (reason := files.failure_of(lambda: files.write_text(report, text.getvalue()))):
        raise UserError(f"--report: {reason}")


def _what_opens(data: str, val_share: float) -> tuple[list[Source], list[Problem]]:
    """Both splits, or all images of classes that are not divided; and what training would say of them.

    Raises UserError if nothing can be opened.
    """
    if val_share:
        return [open_whole(data)], []
    sources: list[Source] = []
    problems: list[Problem] = []
    for split in SPLITS:
        try:
            sources.append(open_source(data, split))
        except UserError as error:
            problems.append(Problem(f"{data} {split}", "not verified", str(error)))
    if not sources:
        return [open_whole(data)], []
    if not problems:
        try:
            check_same_classes(sources[0].class_names, "train", sources[1].class_names, "val", where="the splits")
        except UserError as error:
            problems.append(Problem(data, "classes", str(error)))
    return sources, problems
