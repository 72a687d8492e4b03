"""Convert ImageNet's archives or other images to folders of classes or tar shards; or verify images.

Rerun the command to continue after an interruption.
"""

import csv
import io
import itertools
import shlex
import sys
from pathlib import Path

import numpy as np

from resnet_in1k.cli.arguments import parse
from resnet_in1k.cli.options import PrepareOptions
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.image_folder import FileSource
from resnet_in1k.data.registry import open_source, open_train_and_val
from resnet_in1k.prepare import write
from resnet_in1k.prepare.imagenet import differences, open_archives, open_kaggle
from resnet_in1k.prepare.verify import Problem, open_for_verification, verify
from resnet_in1k.utils import files
from resnet_in1k.utils.device import usable_cores
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count, printable, shorten
from resnet_in1k.utils.process import program


def prepare_data(options: PrepareOptions) -> bool:
    """Write the images, or verify them; return False if --verify found problems.

    After an error the same command continues with what was written.
    """
    output, processes = options.output, options.processes or usable_cores()
    if options.verify is not None:
        return verify_data(options, processes)
    if options.archives:
        sources: tuple[Source, Source] = open_archives(*options.archives, processes)
    elif options.kaggle is not None:
        sources = open_kaggle(options.kaggle)
    else:
        sources = open_train_and_val(options.data, options.val_share)
    _check(sources, options)
    with files.user_errors("--output: "):
        output.mkdir(parents=True, exist_ok=True)
    with files.lock_folder(output):
        files.remove_temporaries(output, files.TEMPORARY)
        for source in sources:
            folder, resize_to = output / source.split, options.resize_to(source.split)
            if options.shards:
                write.write_shards(source, folder, options.shards * 10**6, processes, resize_to)
            else:
                write.write_folder(source, folder, processes, resize_to)
        _check_written(sources, options)
    return True


def _check(sources: tuple[Source, Source], options: PrepareOptions) -> None:
    """Raise UserError before anything is written: for a wrong place, classes that folders cannot have, no space, or
    images that are not ImageNet's."""
    output, num_bytes, num_files, archives = options.output, 0.0, 0, options.archives
    device = files.nearest_existing(output).stat().st_dev
    train, val = ([source.class_names[label] for label in np.unique(source.labels)] for source in sources)
    if not options.shards and set(train) != set(val):
        raise UserError(
            f"{sources[0].name}: images in one split only of {shorten(sorted(set(train) ^ set(val)))}; folders need "
            "the same classes in both: add images, or write --shards, which can have classes without images"
        )
    if not options.shards and train != sorted(train):
        print("class numbers change: a folder numbers its classes in the order of their names; --shards keep them")
    for source in sources:
        if isinstance(source, FileSource) and output.resolve().is_relative_to(source.folder.resolve()):
            raise UserError(f"--output {output} is among the images of {source.folder}; choose a folder outside")
        if source.note:
            print(source.note)
        resize_to = options.resize_to(source.split)
        is_linkable = isinstance(source, FileSource) and Path(source.image_name(0)).stat().st_dev == device
        if any((output / source.split).glob("*plan.json")):
            archives = []  # checked by the run that began to write
        elif options.shards or resize_to or not is_linkable:
            num_files += 0 if options.shards else len(source)
            num_bytes += len(source) * write.mean_written_bytes(source, resize_to)
    write.check_space(output, round(num_bytes), num_files)
    if options.archives or options.kaggle:
        for problem in differences(*sources, archives):  # last, as checksums take minutes
            if not options.allow_partial:
                raise UserError(f"{problem}; download it again, or give --allow-partial if this is intended")
            print(problem)


def _check_written(sources: tuple[Source, Source], options: PrepareOptions) -> None:
    """Open what was written as training opens it, compare the numbers of images, and print what there is."""
    # An absolute path: a relative one may be the name of another source, such as digits.
    data = f"shards:{options.output}" if options.shards else str(options.output.absolute())
    train, val = written = [open_source(data, source.split) for source in sources]
    for copy, original in zip(written, sources, strict=True):
        if len(copy) != len(original):
            raise UserError(
                f"{options.output}/{copy.split} has {len(copy):,} images, and {original.name} {len(original):,}: "
                "images were added or removed there. Remove that class, or the folder, and rerun this command"
            )
    classes = count(len(train.class_names), "class", "es")
    print(f"{options.output}: {len(train):,} training and {len(val):,} validation images, {classes}")
    if any(isinstance(each, FileSource) and Path(each.image_name(0)).stat().st_nlink > 1 for each in written):
        print("images are hard links: editing one in place edits the original, too")
    print(f"train on it:  {program('train')} --data {shlex.quote(data)} --dry-run")


def verify_data(options: PrepareOptions, processes: int) -> bool:
    """Print each problem, and write all problems to --report; return True if there are none."""
    sources, of_splits = open_for_verification(options.verify, options.val_share)
    for source in sources:
        if source.note:
            print(source.note)
    _write_report(options.report, [])  # fails now, not after the images are decoded
    found: list[Problem] = []
    for problem in itertools.chain(of_splits, verify(sources, processes)):
        found.append(problem)
        print(printable(f"{problem.kind}: {problem.image} ({problem.detail})"))
    _write_report(options.report, found)
    problems = count(len(found), "problem") if found else "no problems"
    print(f"{options.verify}: {sum(map(len, sources)):,} images, {problems}")
    return not found


def _write_report(report: Path | None, problems: list[Problem]) -> None:
    if report is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([Problem._fields, *problems])
        with files.user_errors("--report: "):
            files.write_text(report, text.getvalue())


def main() -> None:
    if not prepare_data(parse(PrepareOptions)):
        sys.exit(1)
