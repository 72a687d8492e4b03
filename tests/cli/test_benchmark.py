"""scripts/benchmark.py: what is measured and what it is compared with; no speed is asserted."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.sources import as_shards

from resnet_in1k.cli.benchmark import Bench, BenchmarkOptions, benchmark, ratio, summary
from resnet_in1k.cli.benchmark_parts import INPUT_PARTS, STEP_PARTS
from resnet_in1k.cli.benchmark_table import table
from resnet_in1k.cli.reference import TutorialDataset, TutorialStep
from resnet_in1k.data.dataset import Source
from resnet_in1k.data.registry import open_source
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch

SMALL = {
    "model": "resnet18",
    "batch_size": 4,
    "image_size": 32,
    "steps": 1,
    "repetitions": 1,
    "workers": (1,),
    "cpu_threads": 1,
}


@pytest.fixture
def source(image_folder: Path) -> Source:
    return open_source(str(image_folder), "train")


def test_ways_are_measured_in_turn_and_the_first_round_does_not_count():
    order = []
    rates_to_come = {"a": iter([99, 1, 2, 9]), "b": iter([99, 10, 30, 20])}

    def way(name: str) -> int:
        order.append(name)
        return next(rates_to_come[name])

    bench = Bench(BenchmarkOptions(what="step", **{**SMALL, "repetitions": 3}), Launch())
    rates = bench._interleaved({"a": lambda: way("a"), "b": lambda: way("b")})
    assert order == list("abababab")
    assert rates == {"a": [1, 2, 9], "b": [10, 30, 20]}
    assert summary(rates) == {"a": 2, "b": 20, "a_range": [1, 9], "b_range": [10, 30]}
    assert ratio(rates, "b", "a") == 10


@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("input", {"ours", "tutorial", "decode_only", "ratio", "workers", "augment"}),
        pytest.param("step", {"ours", "tutorial", "bare", "ratio", "overhead"}, marks=pytest.mark.slow),
        pytest.param("train", {"ours", "tutorial", "ratio", "waiting_share", "advice"}, marks=pytest.mark.slow),
    ],
)
def test_rates_and_their_conditions(what: str, keys: set, image_folder: Path, tmp_path: Path):
    """Of a folder only train/ is needed."""
    (tmp_path / "train").symlink_to(image_folder / "train")
    result = benchmark(BenchmarkOptions(what=what, data=str(tmp_path), **SMALL))
    assert keys <= result.keys()
    assert {"hardware", "versions", "commit", "precision", "batch_size", "image_size", "model"} <= result.keys()
    for name in keys & {"ours", "tutorial", "bare", "decode_only"}:
        low, high = result[f"{name}_range"]
        assert 0 < low <= result[name] <= high
    assert result["ratio"] == pytest.approx(result["ours"] / result["tutorial"])
    assert json.loads(json.dumps(result)) == result
    text = table(result)
    assert text.startswith(f"{what}: images/s, median of {SMALL['repetitions']}")
    assert f"{result['ours']:,.1f} (" in text


def test_input_is_measured_for_each_number_of_workers(image_folder: Path):
    options = BenchmarkOptions(what="input", data=str(image_folder), **{**SMALL, "workers": (1, 2)})
    result = benchmark(options)
    assert [row["workers"] for row in result["sweep"]] == [1, 2]
    assert result["ours"] == max(row["ours"] for row in result["sweep"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"repetitions": 0}, "--repetitions 0"),
        ({"workers": (2, 0)}, "--workers 0: must be at least 1"),
        ({"workers": ()}, "--workers: no number given"),
        ({"data": "nowhere"}, "no such folder"),
        ({"data": "digits", "batch_size": 2000}, "1442 images are fewer than --batch-size 2000"),
    ],
)
def test_what_cannot_be_measured_is_named(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        benchmark(BenchmarkOptions(**{"what": "input", **SMALL, **options}))


def test_the_reference_is_the_tutorials_code(source: Source, tiny: Recipe):
    images, label = TutorialDataset(source, tiny)[36]
    assert (images.dtype, images.shape, label) == (torch.float32, (3, 32, 32), 5)
    assert -2.2 < images.min() < images.max() < 2.7  # ImageNet's mean and deviation
    torch.manual_seed(0)
    step = TutorialStep(tiny, torch.device("cpu"))
    batch, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = [step(batch, labels) for _ in range(5)]
    assert all(isinstance(loss, float) for loss in losses)  # fetched at each step
    assert losses[-1] < losses[0] / 2  # it learns these four by heart


@pytest.mark.slow
def test_step_of_two_processes_tells_what_communication_costs(run_script):
    """Three buckets of gradients, as ResNet-18 has 45 MB of them; nothing is printed twice."""
    small = ["--model", "resnet18", "--batch-size", 2, "--image-size", 32, "--steps", 1, "--repetitions", 1]
    result = run_script("scripts/benchmark.py", "step", *small, "--json", config="two_gpu.yaml")
    assert result.returncode == 0, result.stderr
    (measured,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert measured["collectives_per_step"] == {"gloo:all_reduce": 3}
    assert measured["num_processes"] == 2
    assert measured["scaling_efficiency"] == pytest.approx(measured["ours"] / (2 * measured["one_process"]))
    assert measured["communication_share"] < 1
    assert "scaling efficiency" in table(measured)


@pytest.mark.parametrize(
    ("what", "parts"), [("input", INPUT_PARTS), pytest.param("step", STEP_PARTS, marks=pytest.mark.slow)]
)
def test_each_part_is_measured_beside_none(what: str, parts: dict, image_folder: Path):
    result = benchmark(BenchmarkOptions(what=what, data=str(image_folder), parts=True, **SMALL))
    assert result["parts"].keys() == parts.keys()
    for name, share in result["parts"].items():
        low, high = result[f"{name}_range"]
        assert 0 < low <= result[name] <= high
        assert share == pytest.approx(result[name] / result["off"])
    assert result["parts"]["off"] == 1
    text = table(result)
    assert all(re.search(rf"^  {re.escape(name)} +[\d,.]+ \(", text, re.M) for name in parts)


def test_forms_of_the_same_images_are_measured_side_by_side(image_folder: Path, tmp_path: Path):
    shards = as_shards(image_folder, tmp_path)
    options = BenchmarkOptions(what="input", data=str(image_folder), beside=(shards,), **SMALL)
    result = benchmark(options)
    assert result["parts"].keys() == {str(image_folder), shards, "tutorial", "decode only"}
    assert result["parts"][shards] == result[shards] / result[str(image_folder)]
    assert re.search(rf"^  {re.escape(shards)} +[\d,.]+ \(.*\)   [\d.]+ of {image_folder}$", table(result), re.M)
    with pytest.raises(UserError, match="--beside: is for input, without --parts"):
        BenchmarkOptions(what="step", beside=(shards,))
