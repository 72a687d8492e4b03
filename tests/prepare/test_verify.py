"""What --verify finds."""

import csv
import re
import shutil
from pathlib import Path

import pytest
from helpers.preparing import options, prepare, prepare_from

from resnet_in1k.cli.prepare_data import PrepareOptions
from resnet_in1k.utils.errors import UserError


def verified(data: object, **changes: object) -> str:
    """Return what is printed."""
    return "\n".join(prepare(PrepareOptions(verify=str(data), **{"processes": 1, **changes})))


def test_what_is_broken_duplicated_misfiled_or_empty_is_listed(archives, images: list[bytes], tmp_path: Path):
    files, _ = archives
    prepare(options(files, tmp_path / "out"))
    assert verified(tmp_path / "out").endswith("18 images, no problems")
    train, twin = tmp_path / "out/train", tmp_path / "out/val/n03000000/again.JPEG"
    (train / "n01000000/n01000000_0.JPEG").write_bytes(images[0][:200])
    (train / "n02000000/n02000000_1.JPEG").write_bytes(b"")
    shutil.move(train / "n03000000/n03000000_2.JPEG", train / "n02000000")
    shutil.copy(train / "n03000000/n03000000_3.JPEG", twin)
    printed = verified(tmp_path / "out", report=tmp_path / "report.csv", processes=2)
    assert printed.endswith("19 images, 4 problems")
    found = {(Path(row["image"]).name, row["kind"]) for row in csv.DictReader((tmp_path / "report.csv").open())}
    assert found == {
        ("n01000000_0.JPEG", "broken"),
        ("n02000000_1.JPEG", "empty"),
        ("n03000000_2.JPEG", "misfiled"),
        ("again.JPEG", "duplicate"),
    }


def test_images_without_a_val_split_are_verified_all(image_folder: Path, tmp_path: Path):
    """In a folder of classes, or with --val-share; otherwise the val split may be missing."""
    assert verified(image_folder / "train") == f"{image_folder / 'train'}: 37 images, no problems"
    half = tmp_path / "half"
    shutil.copytree(image_folder / "train", half / "train")
    assert re.search(r"splits: .*half \(.*val: no such folder", verified(half))
    assert verified(half, val_share=0.2) == f"{half}: 37 images, no problems"


def test_other_sources_are_verified_too(image_folder: Path, tmp_path: Path):
    prepare_from(image_folder, tmp_path / "out", shards=1)
    assert verified(f"shards:{tmp_path / 'out'}").endswith("49 images, no problems")
    with pytest.raises(UserError, match="nowhere cannot be read: No such file"):
        verified(tmp_path / "nowhere")


def test_a_report_that_cannot_be_written_ends_it_at_once(image_folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--report: .*file/report\.csv"):
        verified(image_folder, report=tmp_path / "file/report.csv")


def test_splits_that_training_would_refuse_are_listed(image_folder: Path, tmp_path: Path):
    """The images of the other split are verified all the same."""
    folder, report = Path(shutil.copytree(image_folder, tmp_path / "images")), tmp_path / "report.csv"
    shutil.rmtree(folder / "val/cat")
    verified(folder, report=report)
    (row,) = csv.DictReader(report.open())
    assert row["kind"] == "splits"
    assert "only in train: cat" in row["detail"]
    (folder / "val/cat").mkdir()
    (folder / "train/ant/0.jpg").write_bytes(b"")
    verified(folder, report=report)
    rows = list(csv.DictReader(report.open()))
    assert [row["kind"] for row in rows] == ["empty"]  # training takes a class without validation images
