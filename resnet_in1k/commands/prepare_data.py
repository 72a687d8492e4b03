"""scripts/prepare_data.py: from the form that images come in to one that trains, checked."""

import contextlib
import csv
import io
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnet_in1k.core import files
from resnet_in1k.core.devices import usable_cores
from resnet_in1k.core.errors import UserError
from resnet_in1k.core.ranges import at_least, at_least_and_below, check_options
from resnet_in1k.core.text import count, file_size, shorten
from resnet_in1k.data.crops import TrainCrop
from resnet_in1k.data.loader import SlotWriter
from resnet_in1k.data.order import BatchSpec, Sample
from resnet_in1k.data.source import Source, Split
from resnet_in1k.data.sources import check_same_classes, open_source, open_train_and_val, open_whole
from resnet_in1k.data.sources.shards import ShardSource
from resnet_in1k.prepare.folder_writer import can_link, check_space, write_folder
from resnet_in1k.prepare.imagenet_archives import Archives, open_archives
from resnet_in1k.prepare.kaggle import open_kaggle
from resnet_in1k.prepare.parallel import Progress
from resnet_in1k.prepare.resize import JPEG_QUALITY, JPEG_SUBSAMPLING, Resizer
from resnet_in1k.prepare.shard_writer import write_shards
from resnet_in1k.prepare.verify import Problem, verify
from resnet_in1k.prepare.written import Change, mean_written_bytes

DONE_NAME = "prepared.json"
"""In the finished folder: what it was made of."""
SPLITS: tuple[Split, ...] = ("train", "val")
SIZED_IMAGES = 100
"""Of which the mean size is taken, to tell how much space is needed."""
GAIN_IMAGES, GAIN_REPETITIONS, GAIN_CROP = 100, 5, 224


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare, and where."""

    train_tar: Path | None = None
    """ILSVRC2012_img_train.tar; with the next two."""
    val_tar: Path | None = None
    """ILSVRC2012_img_val.tar."""
    devkit_tar: Path | None = None
    """ILSVRC2012_devkit_t12.tar.gz, which has the labels of the validation images."""
    allow_partial: bool = False
    """For archives that are not the originals: tell other counts and checksums, and do not refuse them."""
    kaggle: Path | None = None
    """In place of the archives: the folder that Kaggle's was unpacked to, with ILSVRC/ and LOC_val_solution.csv."""
    data: str | None = None
    """In place of the archives: images as for training."""
    val_share: float = field(default=0.0, metadata=at_least_and_below(0, 1))
    """Of --data without a val split: the share that becomes one."""
    output: Path | None = None
    """The folder to write; the originals stay as they are."""
    resize: int | None = field(default=None, metadata=at_least(32))
    """Write copies with a shorter side of so many pixels; smaller images stay as they are."""
    shards: int | None = field(default=None, metadata=at_least(1))
    """Write tar shards of about so many megabytes, for --data shards:OUTPUT, in place of a folder by class."""
    verify: str | None = None
    """Decode all images of this folder or other --data, list what is wrong, and write nothing else."""
    report: Path | None = None
    """With --verify: write the list to this .csv file."""
    processes: int | None = field(default=None, metadata=at_least(1))
    """Processes that work side by side; by default one for each core."""

    @property
    def archives(self) -> list[Path]:
        """Those that are given."""
        return [path for path in (self.train_tar, self.val_tar, self.devkit_tar) if path is not None]

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.archives) not in (0, 3):
            raise UserError("--train-tar, --val-tar and --devkit-tar belong together")
        given = [bool(self.archives), self.kaggle is not None, self.data is not None, self.verify is not None]
        if sum(given) != 1:
            raise UserError("give either the three archives, or --kaggle, or --data, or --verify")
        if self.verify is None and self.output is None:
            raise UserError("--output: where to write is not given")
        if self.report is not None and self.verify is None:
            raise UserError("--report is for --verify")


def prepare_data(options: PrepareOptions, say: Callable[[str], None] = print) -> bool:
    """Write what is asked for, or verify; whether all is well.

    Raises:
        UserError: naming what is missing or wrong; what was written by then stays, and the same command goes on.
    """
    processes = options.processes or usable_cores()
    if options.verify is not None:
        return _verify(options.verify, options.report, processes, say)
    output = options.output
    assert output is not None, "checked with the other options"
    inputs = _inputs(options)
    done = files.read_json_object(output / DONE_NAME)
    if done is not None and inputs["archives"] and _is_whole(done, inputs, options):
        say(f"nothing to do: {output} has {done['num_train_images']:,} + {done['num_val_images']:,} images of these")
        return True
    progress = Progress()
    sources = _sources(options, processes, progress, say)
    if not options.shards:
        _check_splits(sources)
    change = Resizer(options.resize) if options.resize else None
    _check_space(sources, output, change, links=change is None and not options.shards)
    for source in sources:
        how = {"processes": processes, "progress": progress, "change": change, "resized_to": options.resize or 0}
        if options.shards:
            write_shards(source, output / source.split, options.shards * 10**6, **how)
        else:
            write_folder(source, output / source.split, **how)
    written = _check_written(sources, options)
    files.remove_temporaries(output)
    numbers = {f"num_{source.split}_images": len(source) for source in written}
    files.write_json(output / DONE_NAME, {**inputs, **numbers, "num_classes": len(written[0].class_names)})
    say(_summary(sources, written, options))
    return True


def _inputs(options: PrepareOptions) -> dict[str, Any]:
    """What a finished folder is told by."""
    archives = [path for path in options.archives if path.is_file()]
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in archives}
    return {"archives": stats, "resize": options.resize, "shard_megabytes": options.shards}


def _is_whole(done: dict[str, Any], inputs: dict[str, Any], options: PrepareOptions) -> bool:
    """Whether the folder was made of these, and has as many images still."""
    try:
        numbers = {f"num_{split}_images": len(open_source(_written(options), split)) for split in SPLITS}
    except UserError:  # such as for a class that was removed: it is written again
        return False
    return {**inputs, **numbers}.items() <= done.items()


def _sources(
    options: PrepareOptions, processes: int, progress: Progress, say: Callable[[str], None]
) -> tuple[Source, Source]:
    if options.kaggle is not None:
        return open_kaggle(options.kaggle)
    if options.data is not None:
        return open_train_and_val(options.data, options.val_share)
    train, val, devkit = options.archives
    if options.output and not options.resize and not any((options.output / split).exists() for split in SPLITS):
        # Told again later, more exactly; but before minutes of checksums.
        check_space(options.output, sum(path.stat().st_size for path in options.archives if path.is_file()))
    return open_archives(Archives(train, val, devkit), options.allow_partial, processes, progress, say)


def _check_splits(sources: tuple[Source, Source]) -> None:
    """A folder cannot name a class without images: better told before hours of writing than after."""
    train, val = ({source.class_names[label] for label in np.unique(source.labels)} for source in sources)
    if in_one := sorted(train ^ val):
        raise UserError(
            f"{sources[0].name}: images in one split only of {shorten(in_one)}; folders need the same classes in both: "
            "add images, or write --shards, which name classes without images, too"
        )


def _check_space(sources: tuple[Source, Source], output: Path, change: Change | None, links: bool) -> None:
    """Of what is not begun yet, by the sizes that are known, else by those of some images."""
    needed = 0.0
    for source in sources:
        if (output / source.split).exists() or (links and can_link(source, output)):
            continue
        if isinstance(source, ShardSource) and change is None:
            needed += int(source.index.sizes.sum())
        else:
            needed += len(source) * mean_written_bytes(source, change, SIZED_IMAGES)
    check_space(output, round(needed))


def _written(options: PrepareOptions) -> str:
    return f"shards:{options.output}" if options.shards else str(options.output)


def _check_written(sources: tuple[Source, Source], options: PrepareOptions) -> list[Source]:
    """What was written, opened as training opens it; raises UserError if it has other classes or counts."""
    written = [open_source(_written(options), split) for split in SPLITS]
    for ours, theirs in zip(written, sources, strict=True):
        if len(ours) != len(theirs):
            raise UserError(
                f"{options.output}/{ours.split} has {len(ours):,} images, and {theirs.name} {len(theirs):,}; was "
                "something added or removed there? Remove the folder and start again"
            )
    return written


def _summary(sources: tuple[Source, Source], written: list[Source], options: PrepareOptions) -> str:
    train, val = written
    lines = [
        f"{options.output}: {len(train):,} training and {len(val):,} validation images, "
        f"{count(len(train.class_names), 'class', 'es')}, {file_size(_bytes_of(Path(options.output or '.')))}"
    ]
    if options.resize:
        before, after = crop_rates(sources[0], train)
        lines.append(
            f"shorter side {options.resize} px, JPEG of quality {JPEG_QUALITY}, {JPEG_SUBSAMPLING}; measured in one "
            f"process: {after:,.0f} training crops of {GAIN_CROP} px a second, {before:,.0f} from the originals, "
            f"{after / before:.2f} times as many"
        )
    lines.append(f"train on it:  accelerate launch scripts/train.py --data {_written(options)} --dry-run")
    return "\n".join(lines)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def crop_rates(original: Source, copy: Source) -> tuple[float, float]:
    """Images read, decoded and cropped in a second, of each; medians of repetitions in turn."""
    number = min(GAIN_IMAGES, len(original))
    batch = BatchSpec(1, GAIN_CROP, [Sample(1, place * len(original) // number) for place in range(number)])
    slots = torch.empty((1, 3 * number * GAIN_CROP**2), dtype=torch.uint8)
    workers = [SlotWriter(source, TrainCrop(scale_min=0.08, seed=0), slots, "fail") for source in (original, copy)]
    seconds: dict[int, list[float]] = {0: [], 1: []}
    torch.set_num_threads(1)  # as a loader worker has
    for _ in range(GAIN_REPETITIONS):
        for which, worker in enumerate(workers):
            started = time.perf_counter()
            worker.__getitems__((0, batch))
            seconds[which].append(time.perf_counter() - started)
    return number / statistics.median(seconds[0]), number / statistics.median(seconds[1])


def _verify(data: str, report: Path | None, processes: int, say: Callable[[str], None]) -> bool:
    sources, problems = _what_opens(data)
    found: list[Problem] = []
    for problem in itertools.chain(problems, verify(sources, processes, Progress())):
        found.append(problem)
        say(f"{problem.kind}: {problem.image} ({problem.detail})")
    for source in sources:
        if source.note:
            say(source.note)
    if report is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([Problem._fields, *found])
        if problem := files.failure_of(lambda: files.write_text(report, text.getvalue())):
            raise UserError(f"--report: {problem}")
        say(f"written to {report}")
    total = sum(map(len, sources))
    say(f"{data}: {total:,} images, " + (f"{count(len(found), 'problem')}" if found else "all whole"))
    return not found


def _what_opens(data: str) -> tuple[list[Source], list[Problem]]:
    """Both splits, or all images where there is no val split; and what training would say of them.

    Raises UserError if nothing can be opened.
    """
    sources: list[Source] = []
    problems: list[Problem] = []
    for split in SPLITS:
        try:
            sources.append(open_source(data, split))
        except UserError as error:
            problems.append(Problem(f"{data} {split}", "not verified", str(error)))
    if problems:
        with contextlib.suppress(UserError):
            return [open_whole(data)], []
    if not sources:
        raise UserError(problems[0].detail)
    if not problems:
        try:
            check_same_classes(sources[0].class_names, "train", sources[1].class_names, "val", where="the splits")
        except UserError as error:
            problems.append(Problem(data, "classes", str(error)))
    return sources, problems
