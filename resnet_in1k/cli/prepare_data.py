"""scripts/prepare_data.py: from the form that images come in to one that trains, checked."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from resnet_in1k.cli.arguments import parse
from resnet_in1k.cli.crop_rates import CROP_SIZE, crop_rates
from resnet_in1k.cli.verify_data import SPLITS, verify_data
from resnet_in1k.data.dataset import FileSource, Source
from resnet_in1k.data.registry import SOURCES, open_source, open_train_and_val
from resnet_in1k.data.tar_shards import ShardSource
from resnet_in1k.prepare.folder_writer import can_link, check_space, write_folder
from resnet_in1k.prepare.imagenet_archives import Archives, open_archives
from resnet_in1k.prepare.kaggle import open_kaggle
from resnet_in1k.prepare.resize import JPEG_QUALITY, JPEG_SUBSAMPLING, Resizer
from resnet_in1k.prepare.shard_writer import write_shards
from resnet_in1k.prepare.written import content_sha256, mean_written_bytes
from resnet_in1k.utils import files
from resnet_in1k.utils.device import usable_cores
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.files import FolderLock, NoLocksError
from resnet_in1k.utils.format import count, file_size, shorten
from resnet_in1k.utils.pool import Progress
from resnet_in1k.utils.validation import at_least, at_least_and_below, check_options

DONE_NAME = "prepared.json"
"""In the finished folder: what it was made of."""
RESIZED_IMAGES = 100
"""Of which the mean size is taken, to tell how much space copies need."""
SIZED_IMAGES = 1000
"""The same of images as they are."""


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
    """For archives that are not the originals, and Kaggle's: other counts and checksums are told, not refused."""
    kaggle: Path | None = None
    """In place of the archives: the folder that Kaggle's was unpacked to, with ILSVRC/ and LOC_val_solution.csv."""
    data: str | None = None
    """In place of the archives: images as for training."""
    val_share: float = field(default=0.0, metadata=at_least_and_below(0, 1))
    """Of --data without a val split: the share that becomes one; with --verify, that there need be none."""
    output: Path | None = None
    """The folder to write. The originals stay as they are; of files on the same file system it gets hard links."""
    resize: int | None = field(default=None, metadata=at_least(32))
    """Write copies of the training images with a shorter side of so many pixels; smaller images stay as they are."""
    resize_val: bool = False
    """With --resize: copies of the validation images, too; accuracies are then not those on the originals."""
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

    def resized_to(self, source: Source) -> int:
        """0 for as it is."""
        return self.resize if self.resize and (source.split == "train" or self.resize_val) else 0

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.archives) not in (0, 3):
            raise UserError("--train-tar, --val-tar and --devkit-tar belong together")
        given = [bool(self.archives), self.kaggle is not None, self.data is not None, self.verify is not None]
        if sum(given) != 1:
            raise UserError("give either the three archives, or --kaggle, or --data, or --verify")
        if self.verify is None and self.output is None:
            raise UserError("--output: where to write is not given")
        if self.resize_val and self.resize is None:
            raise UserError("--resize-val is for --resize")
        if self.verify is not None and (self.output or self.resize or self.shards):
            raise UserError("--verify writes nothing: --output, --resize and --shards are not for it")
        if self.report is not None and self.verify is None:
            raise UserError("--report is for --verify")
        if self.val_share and self.data is None and self.verify is None:
            raise UserError("--val-share is for --data and --verify; ImageNet's archives and Kaggle's have a val split")
        if self.allow_partial and not self.archives and self.kaggle is None:
            raise UserError("--allow-partial is for ImageNet's archives and Kaggle's")
        if self.output is not None and str(self.output).partition(":")[0] in SOURCES:
            raise UserError(f"--output {self.output}: --data takes that for something else; choose another name")


def prepare_data(options: PrepareOptions, say: Callable[[str], None] = print) -> bool:
    """Write what is asked for, or verify; whether all is well.

    Raises:
        UserError: naming what is missing or wrong; what was written by then stays, and the same command goes on.
    """
    processes = options.processes or usable_cores()
    if options.verify is not None:
        return verify_data(options.verify, options.val_share, options.report, processes, say)
    output = options.output
    assert output is not None, "checked with the other options"
    if options.archives and _is_done(options, inputs := _archive_stats(options), say):
        return True  # before the archives are read, which takes minutes
    progress = Progress()
    sources = _sources(options, processes, progress, say)
    if not options.archives:
        inputs = {"source_sha256": [content_sha256(source) for source in sources]}
        if _is_done(options, inputs, say):
            return True
    _check_place(sources, output)
    if not options.shards:
        _check_classes(sources, say)
    for source in sources:
        if source.note:
            say(source.note)
    _check_space(sources, options)
    num_undecodable = 0
    with _locked(output, say):
        for source in sources:
            resized_to = options.resized_to(source)
            change = Resizer(resized_to) if resized_to else None
            how = {"processes": processes, "progress": progress, "change": change, "resized_to": resized_to}
            if options.shards:
                num_undecodable += write_shards(source, output / source.split, options.shards * 10**6, **how)
            else:
                num_undecodable += write_folder(source, output / source.split, **how)
        written = _check_written(sources, options)
        _write_done(output, {**_how(options, inputs), **_facts(written), "num_classes": len(written[0].class_names)})
    if num_undecodable:
        verify = f"--verify {shlex.quote(_written(options))}"
        say(
            f"{count(num_undecodable, 'image')} could not be decoded: {verify} lists all that are bad; training stops "
            "at one, unless --on-bad-image skip is given"
        )
    say(_summary(sources, written, options))
    return True


def _locked(output: Path, say: Callable[[str], None]) -> contextlib.AbstractContextManager[object]:
    """Nobody else writes to the folder in its body; raises UserError if somebody does, or it cannot be made."""
    if problem := files.failure_of(lambda: output.mkdir(parents=True, exist_ok=True)):
        raise UserError(problem)
    try:
        return contextlib.closing(FolderLock(output))
    except NoLocksError as error:
        say(f"{error}, or nothing keeps a second run from it; going on")
        return contextlib.nullcontext()
    except OSError as error:
        raise UserError(f"{output} cannot be written to: {error.strerror}; choose another --output") from None


def _archive_stats(options: PrepareOptions) -> dict[str, Any]:
    """What the archives are told by in a finished folder."""
    archives = [path for path in options.archives if path.is_file()]
    return {"archives": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in archives}}


def _how(options: PrepareOptions, inputs: dict[str, Any]) -> dict[str, Any]:
    resize_val = {"resize_val": True} if options.resize_val else {}
    return {**inputs, "resize": options.resize, **resize_val, "shard_megabytes": options.shards}


def _facts(written: Iterable[Source]) -> dict[str, Any]:
    """What is in the folder by the names of all files, which it costs little to compare."""
    facts: dict[str, Any] = {}
    for source in written:
        facts[f"num_{source.split}_images"] = len(source)
        facts[f"{source.split}_sha256"] = source.fingerprint()
    return facts


def _is_done(options: PrepareOptions, inputs: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the folder was made of these and is as it was then; if so, it is said."""
    output = options.output
    assert output is not None, "checked with the other options"
    done = files.read_json_object(output / DONE_NAME)
    if done is None or not _how(options, inputs).items() <= done.items():
        return False
    try:
        facts = _facts(open_source(_written(options), split) for split in SPLITS)
    except UserError:  # such as for a class or a shard that was removed: it is written again
        return False
    if not facts.items() <= done.items():
        return False
    say(f"nothing to do: {output} has {done['num_train_images']:,} + {done['num_val_images']:,} images of these")
    return True


def _write_done(output: Path, done: dict[str, Any]) -> None:
    files.remove_temporaries(output, below=False)
    if problem := files.failure_of(lambda: files.write_json(output / DONE_NAME, done)):
        raise UserError(problem)


def _sources(
    options: PrepareOptions, processes: int, progress: Progress, say: Callable[[str], None]
) -> tuple[Source, Source]:
    if options.kaggle is not None:
        return open_kaggle(options.kaggle, options.allow_partial, say)
    if options.data is not None:
        return open_train_and_val(options.data, options.val_share)
    train, val, devkit = options.archives
    if options.output and not options.resize and not any((options.output / split).exists() for split in SPLITS):
        # Told again later, more exactly; but before minutes of checksums.
        check_space(options.output, sum(path.stat().st_size for path in options.archives if path.is_file()))
    return open_archives(Archives(train, val, devkit), options.allow_partial, processes, progress, say)


def _check_place(sources: tuple[Source, Source], output: Path) -> None:
    """What is written must not become part of what it is made of."""
    for source in sources:
        if isinstance(source, FileSource) and files.is_below(output, source.folder):
            raise UserError(f"--output {output} lies among the images of {source.folder}; choose a folder outside")


def _check_classes(sources: tuple[Source, Source], say: Callable[[str], None]) -> None:
    """A folder cannot name a class without images: better told before hours of writing than after."""
    train, val = ([source.class_names[label] for label in np.unique(source.labels)] for source in sources)
    if in_one := sorted(set(train) ^ set(val)):
        raise UserError(
            f"{sources[0].name}: images in one split only of {shorten(in_one)}; folders need the same classes in both: "
            "add images, or write --shards, which name classes without images, too"
        )
    if train != sorted(train):
        say("the classes get other numbers: those of folders are in the order of their names; --shards keep them")


def _check_space(sources: tuple[Source, Source], options: PrepareOptions) -> None:
    """Of what is not begun yet, by the sizes that are known, else by those of some images."""
    output = options.output
    assert output is not None, "checked with the other options"
    needed, num_files = 0.0, 0
    for source in sources:
        resized_to = options.resized_to(source)
        change = Resizer(resized_to) if resized_to else None
        links = change is None and not options.shards
        if (output / source.split).exists() or (links and can_link(source, output)):
            continue
        num_files += 0 if options.shards else len(source)
        if isinstance(source, ShardSource) and change is None:
            needed += int(source.index.sizes.sum())
        else:
            needed += len(source) * mean_written_bytes(source, change, RESIZED_IMAGES if change else SIZED_IMAGES)
    check_space(output, round(needed), num_files)


def _written(options: PrepareOptions) -> str:
    return f"shards:{options.output}" if options.shards else str(options.output)


def _check_written(sources: tuple[Source, Source], options: PrepareOptions) -> list[Source]:
    """What was written, opened as training opens it; raises UserError if a class has not as many images."""
    written = [open_source(_written(options), split) for split in SPLITS]
    for ours, theirs in zip(written, sources, strict=True):
        counts, expected = _class_counts(ours), _class_counts(theirs)
        if wrong := sorted(name for name in counts | expected if counts.get(name) != expected.get(name)):
            name = wrong[0]
            number = count(counts.get(name, 0), "image")
            raise UserError(
                f"{options.output}/{ours.split} has {number} of class {name}, and {theirs.name} "
                f"{expected.get(name, 0):,}; was something added or removed there? Remove that class and run this again"
            )
    return written


def _class_counts(source: Source) -> dict[str, int]:
    counts: dict[str, int] = {}
    for label, number in zip(*(each.tolist() for each in np.unique(source.labels, return_counts=True)), strict=True):
        name = source.class_names[label]
        counts[name] = counts.get(name, 0) + number  # shards may have two classes of one name
    return counts


def _summary(sources: tuple[Source, Source], written: list[Source], options: PrepareOptions) -> str:
    train, val = written
    size = file_size(_size(written))
    if options.resize:
        size += f" in place of {file_size(_size(sources))}"
    lines = [
        f"{options.output}: {len(train):,} training and {len(val):,} validation images, "
        f"{count(len(train.class_names), 'class', 'es')}, about {size}"
    ]
    linked = [each.split for each in written if isinstance(each, FileSource) and _num_links(each) > 1]
    if linked:
        which = " and ".join(linked)
        lines.append(f"the {which} images are hard links: one that is edited in place is edited in the original, too")
    if options.resize:
        before, after = crop_rates(sources[0], train)
        lines.append(
            f"{'both splits' if options.resize_val else 'training images'}: shorter side {options.resize} px, JPEG of "
            f"quality {JPEG_QUALITY}, {JPEG_SUBSAMPLING}; measured in one process: {after:,.0f} training crops of "
            f"{CROP_SIZE} px a second, {before:,.0f} from the originals, {after / before:.2f} times as many"
        )
    lines.append(f"train on it:  accelerate launch scripts/train.py --data {shlex.quote(_written(options))} --dry-run")
    return "\n".join(lines)


def _num_links(source: FileSource) -> int:
    return Path(source.image_name(0)).stat().st_nlink


def _size(sources: Iterable[Source]) -> int:
    """Of the images, in bytes, by the mean of some: to ask for a million sizes over a network takes minutes."""
    return round(sum(len(source) * mean_written_bytes(source, None, SIZED_IMAGES) for source in sources))


def main() -> None:
    if not prepare_data(parse(PrepareOptions, description="Prepare images for training, or verify them.")):
        sys.exit(1)
