"""ImageNet's archives and Kaggle's copy: the folder that is written, after kills, too; hostile archives."""

import gzip
import hashlib
import io
import json
import multiprocessing
import random
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.archives import WNIDS, Archives, add, devkit_of, tar_of, write_archives
from helpers.preparing import contents, options, prepare

from resnet_in1k.cli.prepare_data import PrepareOptions, prepare_data
from resnet_in1k.data.registry import open_train_and_val
from resnet_in1k.prepare import imagenet, write
from resnet_in1k.utils.errors import UserError


def test_archives_come_out_by_class(archives: tuple[Archives, dict[str, bytes]], tmp_path: Path):
    """The labels of the validation images are the devkit's, whose numbers are not in the order of the WordNet ids."""
    files, expected = archives
    before = {path: path.read_bytes() for path in files}
    printed = prepare(options(files, tmp_path / "out", processes=2))
    assert contents(tmp_path / "out") == expected
    assert "train.tar is not ImageNet's ILSVRC2012_img_train.tar: its md5 is" in printed[2]
    assert {path: path.read_bytes() for path in before} == before
    train, val = open_train_and_val(str(tmp_path / "out"))
    assert train.class_names == tuple(sorted(WNIDS))
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # A missing image is an error, as somebody may have changed its class.
    next((tmp_path / "out/val/n01000000").iterdir()).unlink()
    with pytest.raises(UserError, match=r"out/val has 5 images, and .*val\.tar 6: .* Remove that class"):
        prepare(options(files, tmp_path / "out"))


def test_archives_come_out_as_shards_that_others_can_read(archives: tuple[Archives, dict[str, bytes]], tmp_path: Path):
    """Each image is in one of them, with its label."""
    files, expected = archives
    printed = prepare(options(files, tmp_path / "out", shards=1))
    assert f"--data shards:{tmp_path / 'out'}" in printed[-1]
    class_names, found = json.loads((tmp_path / "out/classes.json").read_text()), []
    assert class_names == sorted(WNIDS)
    for shard in (tmp_path / "out").glob("*/shard-*.tar"):
        with tarfile.open(shard) as archive:
            entries = {member.name: archive.extractfile(member).read() for member in archive}
        for name, data in entries.items():
            if name.endswith(".jpg"):
                label = int(entries[name.removesuffix(".jpg") + ".cls"])
                found.append((shard.parent.name, class_names[label], data))
    assert sorted(found) == sorted((*name.split("/")[:2], data) for name, data in expected.items())


def test_space_for_archives_is_checked_before_their_checksums(
    archives: tuple[Archives, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Checksums of 138 GB take minutes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(imagenet, "md5_of", None)
    with pytest.raises(UserError, match=r"has 1 kB free, but .* are needed"):
        prepare(options(archives[0], tmp_path / "out"))


def test_checksums_are_computed_until_something_is_written(
    archives: tuple[Archives, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An interrupted run continues without them."""
    computed: list[Path] = []
    monkeypatch.setattr(imagenet, "md5_of", lambda path: computed.append(path) or hashlib.md5().hexdigest())
    (tmp_path / "out/train").mkdir(parents=True)
    for _ in range(2):
        prepare(options(archives[0], tmp_path / "out"))
        assert computed == list(archives[0])


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"resize": 100}, {"shards": 1}], ids=["resized", "shards"])
def test_killed_at_any_moment_and_run_again_the_result_is_the_same(
    images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, int]
):
    """Two processes write 108 images and are killed (-9) at random moments; workers of the killed run may still write
    when the next run starts."""
    monkeypatch.setattr(write, "IMAGES_PER_JOB", 7)  # of 24 images in a class
    monkeypatch.setattr(write, "SYNC_EVERY_SECONDS", 0.1)
    files, _ = write_archives(tmp_path / "archives", images, repeats=6)
    generator, context = random.Random(0), multiprocessing.get_context("fork")

    def start(output: Path) -> multiprocessing.Process:
        options_of_run = options(files, output, processes=2, **how)
        process = context.Process(target=prepare_data, args=(options_of_run,))
        process.start()
        return process

    started = time.monotonic()
    start(tmp_path / "whole").join()
    took, num_kills = time.monotonic() - started, 0
    while num_kills < 5:
        process = start(tmp_path / "out")
        process.join(timeout=generator.uniform(0, took))
        if process.exitcode is None:
            process.kill()
            num_kills += 1
        process.join()
        if process.exitcode == 0:
            shutil.rmtree(tmp_path / "out")
    process = start(tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    assert everything_in(tmp_path / "out") == everything_in(tmp_path / "whole")


def everything_in(folder: Path) -> dict[str, bytes]:
    """Without the name of the process that locked it last, and without indexes, which have times."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".lock" and "/.index-" not in name}


def test_killed_while_it_writes_its_plan(archives: tuple[Archives, dict[str, bytes]], tmp_path: Path):
    """The hidden files that are left are removed, and do not make the folder somebody else's."""
    files, expected = archives
    for name in ("out/train/..plan.json.123.tmp", "out/val/..plan.json.123.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{")
    prepare(options(files, tmp_path / "out"))
    assert contents(tmp_path / "out") == expected


def class_with(name: str, data: bytes = b"x", **changes: object) -> bytes:
    """Return the training archive of one class with this entry."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        add(archive, f"{WNIDS[0]}_1.JPEG", b"image")
        add(archive, name, data, **changes)
    return tar_of([(f"{WNIDS[0]}.tar", file.getvalue())])


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}
END = r"n01000000\.tar is truncated .* \(its end is missing\)"
OTHER, TRUNCATED = "of .* is not as in ImageNet", "is truncated or not a tar file"
NO_LABEL, NO_DEVKIT = "has no label in the devkit, or no training images", "is truncated or not ImageNet's devkit"
HOSTILE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a path above": ("train", lambda _: class_with("../../escaped.JPEG"), rf"entry '\.\./\.\./escaped\.JPEG' {OTHER}"),
    "an absolute path": ("train", lambda _: class_with("/tmp/escaped.JPEG"), rf"escaped\.JPEG' {OTHER}"),
    "a link": ("train", lambda _: class_with("n_2.JPEG", b"", **LINK), rf"entry 'n_2\.JPEG' {OTHER}"),
    "a size of nothing": ("train", lambda _: class_with("n_2.JPEG", b""), rf"entry 'n_2\.JPEG' {OTHER}"),
    "the same name twice": ("train", lambda _: class_with(f"{WNIDS[0]}_1.JPEG"), OTHER),
    "an empty class": (
        "train",
        lambda _: tar_of([("n01000000.tar", tar_of([]))]),
        r"n01000000\.tar .*\(no entries in it",
    ),
    "truncated": ("train", lambda data: data[:9000], TRUNCATED),
    "no end": ("train", lambda _: tar_of([("n01000000.tar", tar_of([("n_1.JPEG", b"x")])[:1024])]), END),
    "damaged": ("train", lambda data: data.replace(b"n02000000_3.JPEG", b"\xff" * 16), "no entry and no end at byte"),
    "validation outside": ("val", lambda _: tar_of([("../ILSVRC2012_val_00000001.JPEG", b"x")]), OTHER),
    "no label": ("val", lambda _: tar_of([("ILSVRC2012_val_00000099.JPEG", b"x")]), NO_LABEL),
    "a label above the classes": ("devkit", lambda _: devkit_of([4, 1, 2, 2, 1, 3]), NO_LABEL),
    "no truth": ("devkit", lambda _: gzip.compress(tar_of([("meta.mat", b"")])), NO_DEVKIT),
    "devkit truncated": ("devkit", lambda data: data[: len(data) // 2], NO_DEVKIT),
    "a devkit of zeros": ("devkit", lambda _: gzip.compress(bytes(106_000_000), 1), NO_DEVKIT),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_write_nothing_and_name_the_entry(images: list[bytes], tmp_path: Path, name: str):
    which, damage, message = HOSTILE[name]
    files, _ = write_archives(tmp_path / "archives", images)
    path = getattr(files, which)
    path.write_bytes(damage(path.read_bytes()))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        prepare(options(files, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped.JPEG").exists()


def test_the_originals_are_recognized_by_checksums_and_counts(
    monkeypatch: pytest.MonkeyPatch, archives, tmp_path: Path
):
    how = options(archives[0], tmp_path / "out", allow_partial=False)
    with pytest.raises(UserError, match=r"12 train images in .*train\.tar and 6 val .* 1,281,167 and 50,000; download"):
        prepare(how)
    monkeypatch.setattr(imagenet.imagenet, "NUM_TRAIN_IMAGES", 12)
    monkeypatch.setattr(imagenet.imagenet, "NUM_VAL_IMAGES", 6)
    with pytest.raises(UserError, match=r"the 3 classes in .*train\.tar are not ImageNet-1k's 1,000; download"):
        prepare(how)
    monkeypatch.setattr(imagenet.imagenet, "names_by_wnid", lambda: dict.fromkeys(sorted(WNIDS)))
    with pytest.raises(UserError, match=r"train\.tar is not ImageNet's ILSVRC2012_img_train\.tar: its md5 is \w{32}"):
        prepare(how)
    assert not (tmp_path / "out").exists()
    sums = {name: ("x", hashlib.md5(path.read_bytes()).hexdigest()) for name, path in archives[0]._asdict().items()}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    prepare(how)


def write_kaggle(folder: Path, expected: dict[str, bytes]) -> Path:
    """Write the layout of the competition imagenet-object-localization-challenge."""
    images = folder / "ILSVRC/Data/CLS-LOC"
    lines = ["ImageId,PredictionString"]
    for name, data in expected.items():
        split, wnid, file = name.split("/")
        path = images / (f"train/{wnid}/{file}" if split == "train" else f"val/{file}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if split == "val":
            lines.append(f"{Path(file).stem},{wnid} 1 2 3 4 {wnid} 5 6 7 8 ")
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_kaggles_layout_and_what_may_be_wrong_in_it(archives, tmp_path: Path):
    _, expected = archives
    folder = write_kaggle(tmp_path / "kaggle", expected)
    how = PrepareOptions(kaggle=folder, output=tmp_path / "out", allow_partial=True, processes=1)
    with pytest.raises(UserError, match=r"12 train images in .*, where ImageNet has 1,281,167 .*--allow-partial"):
        prepare(replace(how, allow_partial=False))
    (folder / "ILSVRC/Data/CLS-LOC/val/.DS_Store").write_text("a Mac's")
    prepare(how)
    assert contents(tmp_path / "out") == expected
    solution = folder / "LOC_val_solution.csv"
    text = solution.read_text()
    for changed, message in (
        (text.replace("n03000000", "n04000000"), "the class n04000000 has no folder in"),
        (text.replace("val_00000002", "val_00000222"), "ILSVRC2012_val_00000002 is in only one of"),
        (text.replace(",", ";"), r"cannot be read \(ValueError"),
    ):
        solution.write_text(changed)
        with pytest.raises(UserError, match=message):
            prepare(how)
    solution.unlink()
    with pytest.raises(UserError, match=r"Kaggle's layout has ILSVRC/Data/CLS-LOC/ and LOC_val_solution\.csv"):
        prepare(how)
