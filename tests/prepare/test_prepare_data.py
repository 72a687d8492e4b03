"""scripts/prepare_data.py: resized copies, shards and folders; options and input that are refused."""

import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.archives import tar_of_samples
from helpers.preparing import contents, options, prepare, prepare_from
from PIL import Image

from resnet_in1k.cli.prepare_data import PrepareOptions
from resnet_in1k.data.decode import decode
from resnet_in1k.data.registry import open_source
from resnet_in1k.utils.errors import UserError


@pytest.mark.parametrize("resize_val", [False, True])
def test_resized_copies_are_close_to_pillows(images: list[bytes], archives, tmp_path: Path, resize_val: bool):
    """Shorter side 100 px; smaller images, and validation images unless asked for, stay byte for byte."""
    files, expected = archives
    prepare(options(files, tmp_path / "out", resize=100, resize_val=resize_val))
    written = contents(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, data in expected.items():
        original = Image.open(io.BytesIO(data))
        if min(original.size) <= 100 or (name.startswith("val/") and not resize_val):
            assert written[name] == data
            continue
        ours = decode(np.frombuffer(bytearray(written[name]), dtype=np.uint8))
        assert ours.shape == (3, 100, 150)
        theirs = np.asarray(original.resize((150, 100), Image.Resampling.BICUBIC), dtype=int)
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).mean() < 3  # JPEG's own loss
        assert Image.open(io.BytesIO(written[name])).format == "JPEG"


def test_a_rotated_photograph_is_resized_upright(photographs: list[np.ndarray], tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("train/ant", "train/bee", "val/ant", "val/bee"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(photographs[0][:100, :200]).save(tmp_path / "in" / name / "a.jpg", exif=exif)
    prepare_from(tmp_path / "in", tmp_path / "out", resize=50)
    copy = Image.open(tmp_path / "out/train/ant/a.jpg")
    assert copy.size == (50, 100)
    assert not copy.getexif()


def test_a_folder_of_classes_is_divided_without_copies_and_keeps_its_names(
    image_folder: Path, photographs: list[np.ndarray], tmp_path: Path
):
    """Names may have colons, and folders may be named like their class."""
    folder = Path(shutil.copytree(image_folder / "train", tmp_path / "mine"))
    for number, name in enumerate(("ant/a:0.jpg", "ant/ant/0.jpg", "ant/ant/ant/b:0.jpg")):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(photographs[number % 2]).save(folder / name, quality=50 + number)
    prepare_from(folder, tmp_path / "out", val_share=0.2)
    written = {path.split("/", 1)[1]: data for path, data in contents(tmp_path / "out").items()}
    assert written == {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jpg")}
    assert next((tmp_path / "out/train/bee").iterdir()).stat().st_nlink == 2


def test_images_of_shards_are_numbered(tmp_path: Path):
    """Their keys may occur twice, and may lead out of the class's folder."""
    keys = ("ant/one", "bee/two", "ant/one", "ant/../../../outside")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/classes.json").write_text('["ant", "bee"]')
    for split in ("train", "val"):
        samples = [(key, b"\xff\xd8\xff image", int("bee" in key)) for key in keys]
        (tmp_path / f"shards/{split}.tar").write_bytes(tar_of_samples(samples))
    prepare_from(f"shards:{tmp_path / 'shards'}", tmp_path / "a/b/c/out")
    names = ("ant/00000000.jpg", "ant/00000001.jpg", "ant/00000002.jpg", "bee/00000003.jpg")
    written = {path.relative_to(tmp_path / "a/b/c/out").as_posix() for path in (tmp_path / "a").rglob("*.jpg")}
    assert written == {f"{split}/{name}" for split in ("train", "val") for name in names}


def test_a_class_of_one_split_only_is_refused_for_folders_alone(tmp_path: Path):
    """Shards can have classes without images."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/classes.json").write_text('["ant", "bee"]')
    for split, label in (("train", 1), ("val", 0)):
        (tmp_path / f"data/{split}.tar").write_bytes(tar_of_samples([("a", b"image", 0), ("b", b"image", label)]))
    with pytest.raises(UserError, match=r"images in one split only of bee; .* or write --shards"):
        prepare_from(f"shards:{tmp_path / 'data'}", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    prepare_from(f"shards:{tmp_path / 'data'}", tmp_path / "again", shards=1)
    assert open_source(f"shards:{tmp_path / 'again'}", "val").class_names == ("ant", "bee")


@pytest.mark.parametrize("how", [{"resize": 64}, {"resize": 64, "shards": 1}])
def test_a_broken_image_is_copied_and_named(
    image_folder: Path, tmp_path: Path, how: dict[str, int], capsys: pytest.CaptureFixture[str]
):
    """Stopping would cost the hours before; training decides what to do with it."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (folder / "train/dog/1.jpg").write_bytes(b"\xff\xd8\xff broken")
    prepare_from(folder, tmp_path / "out", **how)
    assert "train/dog/1.jpg cannot be decoded (" in capsys.readouterr().err
    written = f"shards:{tmp_path / 'out'}" if "shards" in how else str(tmp_path / "out")
    source = open_source(written, "train")
    assert b"\xff\xd8\xff broken" in [source.read(index).tobytes() for index in range(len(source))]


def test_the_output_is_not_among_the_input(image_folder: Path, tmp_path: Path):
    classes = Path(shutil.copytree(image_folder / "train", tmp_path / "classes"))
    (tmp_path / "link").symlink_to(classes)
    for output in (classes, classes / "out", tmp_path / "link/ant/out"):
        with pytest.raises(UserError, match=r"--output .* is among the images of .*classes; choose a folder outside"):
            prepare_from(classes, output, val_share=0.2)
    assert not (classes / "out").exists()


def test_ignored_files_hard_links_and_changed_class_numbers_are_printed(image_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (folder / "train/ant/photo.heic").write_bytes(b"not known")
    printed = prepare_from(folder, tmp_path / "linked out")
    assert "photographs that cannot be decoded (1 HEIC): ant/photo.heic" in printed[0]
    assert printed[2] == "images are hard links: editing one in place edits the original, too"
    assert printed[3].endswith(f"--data '{tmp_path / 'linked out'}' --dry-run")
    prepare_from(folder, tmp_path / "shards", shards=1)
    (tmp_path / "shards/classes.json").write_text('["f", "e", "d", "c", "b", "a"]')
    printed = prepare_from(f"shards:{tmp_path / 'shards'}", tmp_path / "anew")
    assert printed[0].startswith("class numbers change: a folder numbers its classes in the order of their names")


def test_space_is_checked_before_anything_is_written(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Links need none."""
    usage = SimpleNamespace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for how in ({"shards": 1}, {"resize": 300}):
        with pytest.raises(UserError, match=r"has 50 kB free, but .* are needed"):
            prepare_from(image_folder, tmp_path / "out", **how)
    usage.free = 10**12
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=10_000, f_favail=36))
    with pytest.raises(UserError, match=r"has room for 36 more files \(df -i\), but 37 are needed; try --shards"):
        prepare_from(image_folder, tmp_path / "out", resize=300)
    assert not (tmp_path / "out").exists()
    prepare_from(image_folder, tmp_path / "shards", resize=300, shards=1)
    prepare_from(image_folder, tmp_path / "out")


@pytest.mark.parametrize("how", [{}, {"resize": 64}, {"shards": 1}])
def test_over_a_finished_folder_it_writes_only_what_is_missing(image_folder: Path, tmp_path: Path, how: dict[str, int]):
    prepare_from(image_folder, tmp_path / "out", **how)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    prepare_from(image_folder, tmp_path / "out", **how)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.suffix in (".jpg", ".tar"))
    gone = next((tmp_path / "out/val").glob("*.tar" if how.get("shards") else "cat"))
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    prepare_from(image_folder, tmp_path / "out", **how)
    assert gone.exists()


def test_contradicting_options_are_refused(tmp_path: Path):
    for given, message in (
        ({"train_tar": tmp_path / "a"}, "--train-tar, --val-tar and --devkit-tar belong together"),
        ({}, "give either the three archives, or --kaggle, or --data, or --verify"),
        ({"data": "x"}, "--output: the folder to write is not given"),
        ({"data": "x", "output": tmp_path, "report": tmp_path / "r.csv"}, "--report needs --verify"),
        ({"data": "x", "output": tmp_path, "resize": 5}, "--resize 5: must be at least 32"),
        ({"data": "x", "output": tmp_path, "resize_val": True}, "--resize-val needs --resize"),
        ({"verify": "x", "resize": 64}, "--verify writes nothing: omit --output, --resize and --shards"),
        ({"kaggle": tmp_path, "output": tmp_path, "val_share": 0.1}, "--val-share needs --data or --verify"),
        ({"data": "x", "output": tmp_path, "allow_partial": True}, "--allow-partial needs the archives or --kaggle"),
    ):
        with pytest.raises(UserError, match=message):
            PrepareOptions(**given)
