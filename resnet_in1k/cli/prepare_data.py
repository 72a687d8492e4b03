"""Convert ImageNet's archives, Kaggle's copy or other images to a folder of classes or tar shards; or verify images.

Rerun the command to continue after an interruption.
"""

import csv
import io
import itertools
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from resnet_in1k.cli.arguments import parse
from resnet_in1k.data.dataset import FileSource, Source, Split
from resnet_in1k.data.registry import SOURCES, open_source, open_train_and_val
from resnet_in1k.prepare import write
from resnet_in1k.prepare.imagenet import Archives, open_archives, open_kaggle, refuse_partial
from resnet_in1k.prepare.verify import SPLITS, Problem, open_for_verification, verify
from resnet_in1k.utils import files
from resnet_in1k.utils.device import usable_cores
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.format import count, printable, shorten
from resnet_in1k.utils.validation import check_options, within

Print = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Prepare images for training, or verify them."""

    train_tar: Path | None = None
    """ILSVRC2012_img_train.tar; needs the next two."""
    val_tar: Path | None = None
    """ILSVRC2012_img_val.tar."""
    devkit_tar: Path | None = None
    """ILSVRC2012_devkit_t12.tar.gz, which has the labels of the validation images."""
    allow_partial: bool = False
    """Other checksums or counts than the original's, in archives or Kaggle's copy: a warning instead of an error."""
    kaggle: Path | None = None
    """Instead of the archives: the folder of Kaggle's unpacked archive, with ILSVRC/ and LOC_val_solution.csv."""
    data: str | None = None
    """Instead of the archives: images as for training."""
    val_share: float = field(default=0.0, metadata=within(at_least=0, below=1))
    """Fraction of --data without a val split that becomes one; with --verify: no val split is needed."""
    output: Path | None = None
    """The folder to write. The originals are not changed; files on the same file system become hard links."""
    resize: int | None = field(default=None, metadata=within(at_least=32))
    """Shorter side of training images in pixels: larger images become smaller copies."""
    resize_val: bool = False
    """Resize the validation images, too; accuracies are then not comparable with those on originals."""
    shards: int | None = field(default=None, metadata=within(at_least=1))
    """Write tar shards of about this many megabytes, for --data shards:OUTPUT, instead of a folder of classes."""
    verify: str | None = None
    """Decode all images of this folder or other --data and list what is wrong; write nothing else."""
    report: Path | None = None
    """Write the list of --verify to this .csv file."""
    processes: int | None = field(default=None, metadata=within(at_least=1))
    """Number of worker processes; by default one for each core."""

    @property
    def archives(self) -> Archives | None:
        return Archives(self.train_tar, self.val_tar, self.devkit_tar) if self.train_tar else None

    @property
    def written(self) -> str:
        """The value of --data for what is written."""
        return f"shards:{self.output}" if self.shards else str(self.output)

    def resize_to(self, split: Split) -> int:
        """Return the shorter side in pixels, 0 for unchanged images."""
        return self.resize if self.resize and (split == "train" or self.resize_val) else 0

    def __post_init__(self) -> None:
        check_options(self)
        tars = [path is not None for path in (self.train_tar, self.val_tar, self.devkit_tar)]
        takes_output = self.output or self.resize or self.shards
        for is_wrong, problem in (
            (any(tars) and not all(tars), "--train-tar, --val-tar and --devkit-tar belong together"),
            (
                sum([any(tars), self.kaggle is not None, self.data is not None, self.verify is not None]) != 1,
                "give either the three archives, or --kaggle, or --data, or --verify",
            ),
            (self.verify is None and self.output is None, "--output: the folder to write is not given"),
            (self.resize_val and self.resize is None, "--resize-val needs --resize"),
            (self.verify and takes_output, "--verify writes nothing: omit --output, --resize and --shards"),
            (self.report and self.verify is None, "--report needs --verify"),
            (self.val_share and not (self.data or self.verify), "--val-share needs --data or --verify"),
            (self.allow_partial and not (any(tars) or self.kaggle), "--allow-partial needs the archives or --kaggle"),
            (
                str(self.output).partition(":")[0] in SOURCES,
                f"--output {self.output}: --data would not take this for a folder; choose another name",
            ),
        ):
            if is_wrong:
                raise UserError(problem)


def prepare_data(options: PrepareOptions, print_line: Print = print) -> bool:
    """Write the images, or verify them; return False if --verify found problems.

    After an error the same command continues with what was written.
    """
    processes = options.processes or usable_cores()
    if options.verify is not None:
        return verify_data(options, processes, print_line)
    output = options.output
    assert output is not None, "checked with the other options"
    sources = _open_sources(options, processes, print_line)
    _check(sources, options, print_line)
    num_undecodable = 0
    with files.user_errors("--output: "):
        output.mkdir(parents=True, exist_ok=True)
    with files.lock_folder(output):
        files.remove_temporaries(output, files.TEMPORARY)
        for source in sources:
            how = (processes, options.resize_to(source.split))
            if options.shards:
                num_undecodable += write.write_shards(source, output / source.split, options.shards * 10**6, *how)
            else:
                num_undecodable += write.write_folder(source, output / source.split, *how)
        written = _check_written(sources, options)
    if num_undecodable:
        print_line(
            f"{count(num_undecodable, 'image')} could not be decoded; list them:  python scripts/prepare_data.py "
            f"--verify {shlex.quote(options.written)}\ntraining stops at one, unless --on-bad-image skip is given"
        )
    _print_summary(written, options, print_line)
    return True


def _open_sources(options: PrepareOptions, processes: int, print_line: Print) -> tuple[Source, Source]:
    refuse = print_line if options.allow_partial else refuse_partial
    if options.kaggle is not None:
        return open_kaggle(options.kaggle, refuse)
    if options.data is not None:
        return open_train_and_val(options.data, options.val_share)
    for path in options.archives:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    if not options.resize and not any((options.output / split).exists() for split in SPLITS):
        write.check_space(options.output, sum(path.stat().st_size for path in options.archives))
    return open_archives(options.archives, refuse, processes)


def _check(sources: tuple[Source, Source], options: PrepareOptions, print_line: Print) -> None:
    """Raise UserError before anything is written, for a wrong place, classes that folders cannot have, or no space."""
    output, num_bytes, num_files = options.output, 0.0, 0
    for source in sources:
        if isinstance(source, FileSource) and files.is_below(output, source.folder):
            raise UserError(f"--output {output} is among the images of {source.folder}; choose a folder outside")
        if source.note:
            print_line(source.note)
    train, val = ([source.class_names[label] for label in np.unique(source.labels)] for source in sources)
    if not options.shards:
        if in_one := sorted(set(train) ^ set(val)):
            raise UserError(
                f"{sources[0].name}: images in one split only of {shorten(in_one)}; folders need the same classes in "
                "both: add images, or write --shards, which can have classes without images"
            )
        if train != sorted(train):
            print_line(
                "class numbers change: a folder numbers its classes in the order of their names; --shards keep them"
            )
    for source in sources:
        resize_to, folder = options.resize_to(source.split), output / source.split
        is_linked = not resize_to and not options.shards and write.can_link(source, output)
        if not folder.exists() and not is_linked:
            num_files += 0 if options.shards else len(source)
            num_bytes += len(source) * write.mean_written_bytes(source, resize_to, 100)
    write.check_space(output, round(num_bytes), num_files)


def _check_written(sources: tuple[Source, Source], options: PrepareOptions) -> list[Source]:
    """Open what was written as training opens it; raise UserError if a class does not have as many images."""
    written = [open_source(options.written, split) for split in SPLITS]
    for copy, original in zip(written, sources, strict=True):
        # By name, as shards may have two classes of one name.
        found, expected = (Counter(map(each.class_names.__getitem__, each.labels)) for each in (copy, original))
        if wrong := sorted(name for name in found | expected if found[name] != expected[name]):
            raise UserError(
                f"{options.output}/{copy.split} has {count(found[wrong[0]], 'image')} of class {wrong[0]}, and "
                f"{original.name} {expected[wrong[0]]:,}: images were added or removed there. Remove that class and "
                "rerun this command"
            )
    return written


def _print_summary(written: list[Source], options: PrepareOptions, print_line: Print) -> None:
    train, val = written
    print_line(
        f"{options.output}: {len(train):,} training and {len(val):,} validation images, "
        f"{count(len(train.class_names), 'class', 'es')}"
    )
    if options.resize:
        print_line(
            f"{'both splits' if options.resize_val else 'training images'}: shorter side {options.resize} px, JPEG of "
            f"quality {write.JPEG_QUALITY}, {write.JPEG_SUBSAMPLING}"
        )
    files_of = {each.split: Path(each.image_name(0)) for each in written if isinstance(each, FileSource)}
    if linked := [split for split, path in files_of.items() if path.stat().st_nlink > 1]:
        print_line(f"the {' and '.join(linked)} images are hard links: editing one in place edits the original, too")
    print_line(f"train on it:  accelerate launch scripts/train.py --data {shlex.quote(options.written)} --dry-run")


def verify_data(options: PrepareOptions, processes: int, print_line: Print) -> bool:
    """Print each problem, and write all problems to --report; return True if there are none."""
    sources, of_splits = open_for_verification(options.verify, options.val_share)
    for source in sources:
        if options.report and isinstance(source, FileSource) and files.is_below(options.report, source.folder):
            raise UserError(f"--report: {options.report} would be among the images; choose another place")
    _write_report(options.report, [])  # fails now, not after the images are decoded
    found: list[Problem] = []
    for problem in itertools.chain(of_splits, verify(sources, processes)):
        found.append(problem)
        print_line(printable(f"{problem.kind}: {problem.image} ({problem.detail})"))
    for note in filter(None, (source.note for source in sources)):
        print_line(note)
    _write_report(options.report, found)
    if options.report:
        print_line(f"written to {options.report}")
    problems = count(len(found), "problem") if found else "no problems"
    print_line(f"{options.verify}: {sum(map(len, sources)):,} images, {problems}")
    return not found


def _write_report(report: Path | None, problems: list[Problem]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Problem._fields, *problems])
    if report is not None:
        with files.user_errors("--report: "):
            files.write_text(report, text.getvalue())


def main() -> None:
    if not prepare_data(parse(PrepareOptions)):
        sys.exit(1)
