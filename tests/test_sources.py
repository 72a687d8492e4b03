import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from resnet_in1k.errors import UserError
from resnet_in1k.images import decode
from resnet_in1k.sources import PackedBytes, open_source, open_train_and_val


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(image_folder, tmp_path / "images"))


def test_packed_bytes_is_a_list_of_bytes():
    items = [b"one", b"", "zwölf/Bild.jpg".encode(), b"\xff\x00"]
    packed = PackedBytes(items)
    assert [packed[i] for i in range(len(packed))] == items


def test_folder_lists_files_by_class(image_folder: Path):
    train, val = open_train_and_val(str(image_folder))
    assert train.class_names == ("ant", "bee", "cat", "dog", "eel", "fox")
    assert (len(train), len(val)) == (37, 12)
    for index in (0, 6, 7, 36):
        path = Path(train.image_name(index))
        assert path.parent.name == train.class_names[train.labels[index]]
        assert train.read(index).tobytes() == path.read_bytes()
    assert np.bincount(train.labels).tolist() == [7, 6, 6, 6, 6, 6]


def test_folder_finds_images_at_any_depth_and_tells_what_it_ignored(folder: Path):
    deeper = folder / "train/ant/more"
    deeper.mkdir()
    shutil.copy(folder / "train/ant/0.jpg", deeper / "x.JPEG")
    (folder / "train/ant/notes.txt").write_text("not an image")
    (folder / "train/.DS_Store").write_text("")
    train = open_source(str(folder), "train")
    assert len(train) == 38
    assert "ant/notes.txt" in train.note


def test_what_is_an_image_is_told_by_its_content_where_its_name_does_not(folder: Path):
    picture = Image.open(folder / "train/ant/0.jpg")
    for name, kind in [("a.JPEG", "PNG"), ("b.png", "WEBP"), ("c.dat", "BMP"), ("d", "TIFF"), ("e.JPG", "GIF")]:
        picture.save(folder / "train/ant" / name, format=kind)
    (folder / "train/ant/text.JPEG").write_text("not an image, but said to be one")
    (folder / "train/ant/notes").write_text("not an image, nor said to be one")
    train = open_source(str(folder), "train")
    names = [Path(train.image_name(index)).name for index in range(7 + 6)]
    assert sorted(names) == sorted(
        ["a.JPEG", "b.png", "c.dat", "d", "e.JPG", "text.JPEG", *(f"{number}.jpg" for number in range(7))]
    )
    assert train.note.endswith("ant/notes")
    for index, name in enumerate(names):
        if name != "text.JPEG":
            assert decode(train.read(index)).shape[1:] == (picture.height, picture.width) or name[0].isdigit()


def test_labels_follow_names_not_places(folder: Path):
    """Folders 0, 1, 10, 2 must mean the same class in train and val, however they sort."""
    for split in ("train", "val"):
        for old, new in zip(["ant", "bee", "cat", "dog"], ["0", "1", "10", "2"], strict=True):
            (folder / split / old).rename(folder / split / new)
    train, val = open_train_and_val(str(folder))
    assert train.class_names == val.class_names
    assert Path(val.image_name(int(np.flatnonzero(val.labels == 3)[0]))).parent.name == val.class_names[3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder; images belong in DATA/train/<class>/"),
        (lambda f: shutil.rmtree(f / "val"), "val: no such folder"),
        (lambda f: [shutil.rmtree(c) for c in (f / "train").iterdir()], "train: no class folders"),
        (lambda f: (f / "train/gnu").mkdir(), "gnu: no images in this class"),
        (lambda f: shutil.rmtree(f / "val/cat"), "only in train: cat;"),
        (lambda f: (f / "val/cat").rename(f / "val/kat"), "only in train: cat; only in val: kat"),
        (lambda f: shutil.move(f / "train/ant/0.jpg", f / "train"), "files must lie in a folder named for their class"),
        (lambda f: shutil.move(f / "val/ant/0.jpg", f / "val"), "files must lie in a folder named for their class"),
    ],
)
def test_what_is_refused_is_named(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        open_train_and_val(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_fingerprint_changes_with_the_files(folder: Path):
    before = open_source(str(folder), "train").fingerprint()
    assert open_source(str(folder), "train").fingerprint() == before
    (folder / "train/ant/0.jpg").rename(folder / "train/ant/renamed.jpg")
    assert open_source(str(folder), "train").fingerprint() != before


def test_digits_are_scikit_learns_split_in_two(tmp_path: Path):
    train, val = open_train_and_val("digits")
    digits = load_digits()
    assert len(train) + len(val) == len(digits.target) == 1797
    assert np.array_equal(np.bincount(train.labels) + np.bincount(val.labels), np.bincount(digits.target))
    assert min(np.bincount(val.labels)) >= 34  # a fifth of each class
    train_bytes = {train.read(i).tobytes() for i in range(len(train))}
    assert not train_bytes & {val.read(i).tobytes() for i in range(len(val))}

    # The first validation image is the fifth of its class, enlarged: shrunk again it is scikit-learn's own.
    label = int(val.labels[0])
    image = decode(val.read(0)).permute(1, 2, 0).numpy()
    small = np.asarray(Image.fromarray(image).convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
    original = digits.images[np.flatnonzero(digits.target == label)[4]] * (255 / 16)
    assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.98


def test_synthetic_looks_like_imagenet():
    source = open_source("synthetic", "val")
    assert len(source.class_names) == 1000
    assert decode(source.read(len(source) - 1)).shape == (3, 375, 500)
    assert 80_000 < len(source.read(0)) < 140_000


def tree_of_links(root: Path, image: Path, num_classes: int, images_per_class: int) -> Path:
    for split, count in (("train", images_per_class), ("val", 1)):
        for label in range(num_classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"n{label:08d}_{number}.JPEG").symlink_to(image)
    return root


def test_a_hundred_thousand_files_cost_little_memory(image_folder: Path, tmp_path: Path):
    """In a process of its own: how much more is resident once they are listed."""
    root = tree_of_links(tmp_path, image_folder / "train/ant/0.jpg", num_classes=100, images_per_class=1000)
    code = f"""
import psutil
from resnet_in1k.sources import open_source
before = psutil.Process().memory_info().rss
source = open_source({str(root)!r}, "train")
print(len(source), psutil.Process().memory_info().rss - before, source.items.num_bytes)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    num_images, resident_bytes, packed_bytes = map(int, result.stdout.split())
    assert num_images == 100_000
    assert packed_bytes < 5e6
    assert resident_bytes < 30e6
