"""Digits, synthetic images, facts for the model card; a source added from outside."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.images import encoded
from helpers.loading import eval_batches
from PIL import Image
from sklearn.datasets import load_digits

from resnet_in1k.data.dataset import Source, SourceFacts
from resnet_in1k.data.decode import decode
from resnet_in1k.data.registry import SOURCES, check_same_classes, open_source, open_train_and_val, source_facts
from resnet_in1k.utils.errors import UserError


def test_the_same_classes_in_another_order_are_refused():
    with pytest.raises(UserError, match="data: train and val have the same classes in another order"):
        check_same_classes("ab", "train", "ba", "val", where="data")


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


def test_facts_for_the_model_card_come_from_the_source(tmp_path: Path):
    """Without the folders above the data, quoted for a shell, and whether or not the data is available."""
    facts = source_facts("/home/me/my images")
    assert (facts.name, facts.data_flag) == ("my images", "'path/to/my images'")
    assert source_facts("digits").data_flag == "digits"
    assert source_facts("hf:ILSVRC/imagenet-1k").data_flag == "hf:ILSVRC/imagenet-1k"
    facts = source_facts(f"hf:{tmp_path}::a,b:second")
    assert (facts.name, facts.data_flag) == (tmp_path.name, f"hf:path/to/{tmp_path.name}::a,b:second")
    assert source_facts("shards:/home/me/set/a-{split}-*.tar").name == "set"
    limits = [" ".join(source_facts(data).limits) for data in ("folder", "digits", "synthetic")]
    assert [("bias" in text, "digits" in text, "noise" in text) for text in limits] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


class GraySquares:
    """Squares of one gray level each, 20 levels apart; the label is whether the level is above 127."""

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
