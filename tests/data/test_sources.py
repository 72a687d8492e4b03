"""Folders, digits, synthetic images, lists of files; a source added from outside."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.images import encoded, tree_of_links
from helpers.loading import eval_batches
from helpers.processes import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from resnet_in1k.data.dataset import Source, SourceFacts
from resnet_in1k.data.decode import decode
from resnet_in1k.data.image_paths import list_images, open_paths
from resnet_in1k.data.registry import SOURCES, check_same_classes, open_source, open_train_and_val, source_facts
from resnet_in1k.utils.errors import UserError


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(image_folder, tmp_path / "images"))


def test_folder_lists_files_by_class(image_folder: Path):
    train, val = open_train_and_val(str(image_folder))
    assert train.class_names == ("ant", "bee", "cat", "dog", "eel", "fox")
    assert (len(train), len(val), train.note) == (37, 12, "")
    for index in (0, 6, 7, 36):
        path = Path(train.image_name(index))
        assert path.parent.name == train.class_names[train.labels[index]]
        assert train.read(index).tobytes() == path.read_bytes()
    assert np.bincount(train.labels).tolist() == [7, 6, 6, 6, 6, 6]


def test_folder_finds_images_at_any_depth_and_reports_what_it_ignored(folder: Path):
    deeper = folder / "train/ant/more"
    deeper.mkdir()
    shutil.copy(folder / "train/ant/0.jpg", deeper / "x.JPEG")
    (folder / "train/ant/notes.txt").write_text("not an image")
    (folder / "train/.DS_Store").write_text("")
    train = open_source(str(folder), "train")
    assert len(train) == 38
    assert train.note.endswith("not images by name or content: ant/notes.txt")


def test_a_file_is_an_image_by_its_name_or_by_its_content(folder: Path):
    picture = Image.open(folder / "train/ant/0.jpg")
    for name, kind in [("a.JPEG", "PNG"), ("b.png", "WEBP"), ("c.dat", "BMP"), ("d", "TIFF"), ("e.JPG", "GIF")]:
        picture.save(folder / "train/ant" / name, format=kind)
    (folder / "train/ant/text.JPEG").write_text("not an image, but named as one")
    (folder / "train/ant/notes").write_text("not an image, nor named as one")
    train = open_source(str(folder), "train")
    names = [Path(train.image_name(index)).name for index in range(7 + 6)]
    assert sorted(names) == sorted(
        ["a.JPEG", "b.png", "c.dat", "d", "e.JPG", "text.JPEG", *(f"{number}.jpg" for number in range(7))]
    )
    assert train.note.endswith("ant/notes")
    for name in ("a.JPEG", "b.png", "c.dat", "d", "e.JPG"):
        assert decode(train.read(names.index(name))).shape[1:] == (picture.height, picture.width)


def test_classes_are_matched_by_name_however_the_names_sort(folder: Path):
    """Folders 0, 1, 10, 2 must mean the same class in train and val."""
    for split in ("train", "val"):
        for old, new in zip(["ant", "bee", "cat", "dog"], ["0", "1", "10", "2"], strict=True):
            (folder / split / old).rename(folder / split / new)
    train, val = open_train_and_val(str(folder))
    assert train.class_names == val.class_names
    assert Path(val.image_name(int(np.flatnonzero(val.labels == 3)[0]))).parent.name == val.class_names[3]


def test_the_same_classes_in_another_order_are_refused():
    with pytest.raises(UserError, match="data: train and val have the same classes in another order"):
        check_same_classes("ab", "train", "ba", "val", where="data")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder; images belong in DATA/train/<class>/"),
        (lambda f: shutil.rmtree(f / "val"), "val: no such folder"),
        (lambda f: [shutil.rmtree(c) for c in (f / "train").iterdir()], "train: no class folders"),
        (lambda f: (f / "train/gnu").mkdir(), "gnu: no images in this class"),
        (lambda f: shutil.rmtree(f / "val/cat"), "only in train: cat;"),
        (lambda f: (f / "val/cat").rename(f / "val/kat"), "only in train: cat; only in val: kat"),
        (lambda f: shutil.move(f / "train/ant/0.jpg", f / "train"), "files must be in a folder named for their class"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        open_train_and_val(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_fingerprint_of_a_folder_changes_with_its_files(folder: Path):
    before = open_source(str(folder), "train").fingerprint()
    assert open_source(str(folder), "train").fingerprint() == before
    (folder / "train/ant/0.jpg").rename(folder / "train/ant/renamed.jpg")
    assert open_source(str(folder), "train").fingerprint() != before


@pytest.mark.slow
def test_a_hundred_thousand_files_cost_little_memory(image_folder: Path, tmp_path: Path):
    """In a process of its own: how much more is resident once they are listed."""
    root = tree_of_links(tmp_path, image_folder / "train/ant/0.jpg", num_classes=100, images_per_class=1000)
    code = f"""
import psutil
from resnet_in1k.data.registry import open_source
before = psutil.Process().memory_info().rss
source = open_source({str(root)!r}, "train")
print(len(source), psutil.Process().memory_info().rss - before, source.items.num_bytes)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    num_images, resident_bytes, packed_bytes = map(int, result.stdout.split())
    assert num_images == 100_000
    assert packed_bytes < 5e6
    assert resident_bytes < 30e6


def test_digits_are_scikit_learns_split_in_two():
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


def test_synthetic_images_have_the_size_of_imagenets():
    source = open_source("synthetic", "val")
    assert len(source.class_names) == 1000
    assert decode(source.read(len(source) - 1)).shape == (3, 375, 500)
    assert 80_000 < len(source.read(0)) < 140_000


def test_listed_images_are_files_and_those_in_folders_in_the_order_given(image_folder: Path, tmp_path: Path):
    single, folder, empty, gone = image_folder / "val/fox/0.jpg", image_folder / "val/ant", tmp_path, tmp_path / "gone"
    assert list(list_images([single, folder, empty, gone])) == [
        (str(single), ""),
        (str(folder / "0.jpg"), ""),
        (str(folder / "1.jpg"), ""),
        (str(empty), "no images in this folder"),
        (str(gone), "No such file or directory"),
    ]
    source = open_paths([str(single), str(folder / "1.jpg")])
    assert [source.image_name(index) for index in range(2)] == [str(single), str(folder / "1.jpg")]
    assert source.read(1).tobytes() == (folder / "1.jpg").read_bytes()
    assert source.labels.tolist() == [0, 0]


def test_facts_for_the_model_card_come_from_the_source():
    """Without the folders a data set is in, quoted for a shell, and whether or not it is here."""
    facts = source_facts("/home/me/my images")
    assert (facts.name, facts.data_flag) == ("my images", "'path/to/my images'")
    assert source_facts("digits").data_flag == "digits"
    limits = [" ".join(source_facts(data).limits) for data in ("folder", "digits", "synthetic")]
    assert [("bias" in text, "digits" in text, "noise" in text) for text in limits] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


class GraySquares:
    """Squares of one gray level each, whose label is whether it is above 127; 20 levels apart from the given one."""

    note = ""
    class_names = ("dark", "bright")

    def __init__(self, name: str, split: str, first_level: int):
        self.name, self.split = name, split
        self._levels = np.arange(first_level, 256, 20)
        self.labels = (self._levels > 127).astype(np.int64)

    def __len__(self) -> int:
        return len(self._levels)

    def read(self, index: int) -> np.ndarray:
        return encoded(Image.new("L", (40, 40), int(self._levels[index])), format="PNG")

    def image_name(self, index: int) -> str:
        return f"level {self._levels[index]}"

    def fingerprint(self) -> str:
        return self._levels.tobytes().hex()


def test_a_source_added_from_outside_is_opened_read_and_described(monkeypatch: pytest.MonkeyPatch):
    def open_split(data: str, split: str) -> Source:
        return GraySquares(data, split, first_level=int(data.partition(":")[2]))

    def facts(data: str) -> SourceFacts:
        return SourceFacts(name="gray", data_flag=data, limits=("Squares have no content.",))

    monkeypatch.setitem(SOURCES, "gray", SimpleNamespace(open_split=open_split, facts=facts))
    train, val = open_train_and_val("gray:5")
    assert (train.split, val.split, train.name, val.image_name(1)) == ("train", "val", "gray:5", "level 25")
    batches = eval_batches(val, num_workers=1)
    levels = [int(level) for batch in batches for level in batch.images.float().mean(dim=(1, 2, 3))]
    assert levels == list(range(5, 256, 20))
    assert [int(label) for batch in batches for label in batch.labels] == [level > 127 for level in levels]
    assert source_facts("gray:5") == SourceFacts("gray", "gray:5", ("Squares have no content.",))
    assert source_facts("other").name == "other"  # a folder, still
