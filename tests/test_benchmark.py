import json
from pathlib import Path

import pytest
import torch

from resnet_in1k.benchmark import (
    BenchmarkOptions,
    TutorialDataset,
    TutorialStep,
    benchmark,
    interleaved,
    ratio,
    summary,
    table,
)
from resnet_in1k.errors import UserError
from resnet_in1k.sources import open_source

SMALL = {"model": "resnet18", "batch_size": 8, "image_size": 32, "steps": 2, "repetitions": 2, "workers": (1,)}


def test_ways_take_turns_and_the_first_round_does_not_count():
    order = []
    clocks = {"a": iter([99, 1, 2, 9]), "b": iter([99, 10, 30, 20])}
    rates = interleaved({name: lambda name=name: order.append(name) or next(clocks[name]) for name in "ab"}, 3)
    assert order == list("abababab")
    assert rates == {"a": [1, 2, 9], "b": [10, 30, 20]}
    assert summary(rates) == {"a": 2, "b": 20, "a_range": [1, 9], "b_range": [10, 30]}
    assert ratio(rates, "b", "a") == 10


@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("input", {"ours", "tutorial", "decode_only", "ratio", "workers", "sweep", "augment"}),
        ("step", {"ours", "tutorial", "bare", "ratio", "overhead"}),
        ("train", {"ours", "tutorial", "ratio", "waiting_share", "advice", "imagenet_hours"}),
    ],
)
def test_what_is_measured_and_under_which_conditions(what: str, keys: set, image_folder: Path):
    result = benchmark(BenchmarkOptions(what=what, data=str(image_folder), **SMALL))
    assert keys <= result.keys()
    assert {"hardware", "versions", "commit", "precision", "batch_size", "image_size", "model"} <= result.keys()
    for name in keys & {"ours", "tutorial", "bare", "decode_only"}:
        low, high = result[f"{name}_range"]
        assert 0 < low <= result[name] <= high
    assert result["ratio"] == pytest.approx(result["ours"] / result["tutorial"])
    assert json.loads(json.dumps(result)) == result
    text = table(result)
    assert text.startswith(f"{what}: images/s, median of 2")
    assert f"{result['ours']:,.1f} (" in text


def test_a_folder_with_train_alone_serves(image_folder: Path, tmp_path: Path, run_script):
    (tmp_path / "train").symlink_to(image_folder / "train")
    flags = ["--model", "resnet18", "--batch-size", 8, "--image-size", 32, "--steps", 1, "--repetitions", 1]
    flags += ["--workers", 1, 2, "--json"]
    result = run_script("scripts/benchmark.py", "input", "--data", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert [row["workers"] for row in json.loads(result.stdout)["sweep"]] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"repetitions": 0}, "--repetitions 0"),
        ({"workers": (0,)}, "--workers: numbers of at least 1"),
        ({"data": "nowhere"}, "no such folder"),
        ({"data": "digits", "batch_size": 2000}, "1442 images are fewer than --batch-size 2000"),
    ],
)
def test_what_cannot_be_measured_is_named(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        benchmark(BenchmarkOptions(**{"what": "input", **SMALL, **options}))


def test_the_reference_is_the_tutorials_code(image_folder: Path, tiny):
    images, label = TutorialDataset(open_source(str(image_folder), "train"), tiny)[36]
    assert (images.dtype, images.shape, label) == (torch.float32, (3, 32, 32), 5)
    assert -2.2 < images.min() < images.max() < 2.7  # ImageNet's mean and deviation
    step = TutorialStep(tiny, torch.device("cpu"))
    batch, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = [step(batch, labels) for _ in range(12)]
    assert all(isinstance(loss, float) for loss in losses)  # fetched at each step
    assert losses[-1] < losses[0] / 2  # it learns these four by heart
