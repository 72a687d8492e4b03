"""cli/benchmark.py: what is measured and compared; no speed is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.two_processes import run_two

from resnet_in1k.cli.benchmark import TUTORIAL, Bench, BenchmarkOptions, benchmark, table
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.launch import Launch

RECIPE = replace(TUTORIAL, model="resnet18", image_size=32)
SMALL = {"batch_size": 4, "recipe": RECIPE, "steps": 1, "repetitions": 1, "workers": 1, "cpu_threads": 1}


def test_ways_are_measured_in_turn_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch):
    order, rates_to_come = [], {"ours": iter([99, 1, 2, 9]), "tutorial": iter([99, 10, 30, 20])}
    bench = Bench(BenchmarkOptions(what="step", **{**SMALL, "repetitions": 3}), Launch())

    def rate(_: None, name: str) -> int:
        order.append(name)
        return next(rates_to_come[name])

    monkeypatch.setattr(bench, "_rate", rate)
    measured = bench._measure(ours=(None, "ours"), tutorial=(None, "tutorial"))
    assert order == ["ours", "tutorial"] * 4
    assert measured == {"ours": 2, "tutorial": 20, "ours_range": [1, 9], "tutorial_range": [10, 30], "ratio": 0.1}


@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("input", {"ours", "tutorial", "decode_only", "ratio", "workers", "augment"}),
        pytest.param("step", {"ours", "tutorial", "bare", "ratio", "overhead"}, marks=pytest.mark.slow),
        pytest.param("train", {"ours", "tutorial", "ratio", "waiting_share", "advice"}, marks=pytest.mark.slow),
    ],
)
def test_rates_and_their_conditions(what: str, keys: set, image_folder: Path, tmp_path: Path):
    """A folder needs train/ only."""
    (tmp_path / "train").symlink_to(image_folder / "train")
    result = benchmark(BenchmarkOptions(what=what, data=str(tmp_path), **SMALL))
    conditions = {"hardware", "versions", "commit", "precision", "batch_size", "image_size", "model", "num_processes"}
    assert keys | conditions <= result.keys()
    for name in keys & {"ours", "tutorial", "bare", "decode_only", "augment"}:
        low, high = result[f"{name}_range"]
        assert 0 < low <= result[name] <= high
        assert f"  {name.replace('_', ' '):<22}{result[name]:,.1f} (" in table(result)
    assert result["ratio"] == pytest.approx(result["ours"] / result["tutorial"])
    assert json.loads(json.dumps(result)) == result
    assert table(result).startswith(f"{what}: images/s, median of {SMALL['repetitions']}")


@pytest.mark.slow
def test_the_recipes_own_parts_are_measured():
    """Optimizer, loss, average and stochastic depth in `step`; a policy in `input`."""
    changes = {"optimizer": "lamb", "loss": "binary_cross_entropy", "stochastic_depth": 0.2, "ema_decay": 0.9}
    recipe = replace(RECIPE, mixup_alpha=0.2, augment_policy="trivial_augment", **changes)
    for what in ("step", "input"):
        result = benchmark(BenchmarkOptions(what=what, data="digits", **{**SMALL, "recipe": recipe}))
        assert result["ours"] > 0
        assert "optimizer sgd → lamb" in result["recipe_changes"]
        assert "'augment_policy none → trivial_augment'" in table(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"repetitions": 0}, "--repetitions 0"),
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"data": "nowhere"}, "no such folder"),
        ({"data": "digits", "batch_size": 2000}, "1442 images are fewer than --batch-size 2000"),
        ({"recipe": replace(RECIPE, shuffle_window=2)}, "--shuffle-window: "),
    ],
)
def test_options_that_cannot_be_measured_are_errors(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        benchmark(BenchmarkOptions(**{"what": "input", **SMALL, **options}))


@pytest.mark.slow
def test_step_of_two_processes_measures_communication():
    """Three buckets of gradients, as ResNet-18 has 45 MB; process 1 prints nothing."""
    small = "--model resnet18 --batch-size 2 --image-size 32 --steps 1 --repetitions 1"
    printed, other = run_two("scripts/benchmark.py", "step", "--json", *small.split())
    assert other == ""
    measured = json.loads(printed)
    assert measured["collectives_per_step"] == {"gloo:all_reduce": 3}
    assert measured["num_processes"] == 2
    assert measured["scaling_efficiency"] == pytest.approx(measured["ours"] / (2 * measured["one_process"]))
    assert measured["communication_share"] < 1
    assert "scaling efficiency" in table(measured)
