"""Digits, synthetic images, facts for the model card."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from resnet_in1k.data.decode import decode
from resnet_in1k.data.registry import check_same_classes, open_source, open_train_and_val, source_facts
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
    train_images, val_images = ({source.read(i).tobytes() for i in range(len(source))} for source in (train, val))
    assert not train_images & val_images

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
    for data, name, flag in (
        ("/home/me/my images", "my images", "'path/to/my images'"),
        ("hf:ILSVRC/imagenet-1k", "ILSVRC/imagenet-1k", "hf:ILSVRC/imagenet-1k"),
        (f"hf:{tmp_path}::a,b:second", tmp_path.name, f"hf:path/to/{tmp_path.name}::a,b:second"),
        ("shards:/home/me/set/a-*.tar", "set", "'shards:path/to/a-*.tar'"),
    ):
        facts = source_facts(data)
        assert (facts.name, facts.data_flag) == (name, flag)
    for data, word in (("folder", "bias"), ("digits", "digits"), ("synthetic", "noise")):
        assert word in source_facts(data).limits
