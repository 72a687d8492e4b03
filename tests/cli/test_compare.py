"""scripts/compare.py, without the script."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.training import TINY

from resnet_in1k.cli.compare import CompareOptions, compare
from resnet_in1k.cli.evaluate import EvalOptions, evaluate
from resnet_in1k.run_folder import RunFolder, write_recipe
from resnet_in1k.utils.errors import UserError


@pytest.fixture
def other(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A run with the images 0, 1 and 2 of 12 right, which differs from any network that predicts one class."""
    copied = shutil.copytree(finished.path, tmp_path / "$other$", ignore=shutil.ignore_patterns("checkpoints"))
    folder = RunFolder(Path(copied))
    facts, result = (json.loads(path.read_text()) for path in (finished.recipe, finished.evaluation))
    facts["recipe"] |= {"epochs": 1, "lr": 0.01}
    facts["init_from"] = {"checkpoint": "timm/resnet18.a1_in1k", "sha256": "00"}
    folder.recipe.write_text(json.dumps(facts))
    right = base64.b64encode(np.packbits(np.arange(12) < 3)).decode()
    result |= {"top1_correct": 3, "top1_accuracy": 0.25, "top1_right": right}
    folder.evaluation.write_text(json.dumps(result))
    return folder


def test_two_runs_on_the_same_images(finished: RunFolder, other: RunFolder, tmp_path: Path):
    picture = tmp_path / "compared.svg"
    text = compare(CompareOptions(items=(str(finished.path), str(other.path)), picture=picture))
    _, first, second, *rest = text.splitlines()
    for line, folder in ((first, finished), (second, other)):
        recorded = json.loads(folder.evaluation.read_text())
        assert line.split()[:2] == [folder.path.name, f"{recorded['top1_accuracy']:.2%}"]
        rates = sorted(record["images_per_second"] for record in folder.records() if record["kind"] == "train")
        assert float(line.split()[-1].replace(",", "")) == pytest.approx(
            sum(rates[len(rates) // 2 - 1 :][:2]) / 2, abs=1
        )
    changes = "epochs 2 → 1; lr 0.002 → 0.01; started from random weights → timm/resnet18.a1_in1k"
    assert f"  $other$: {changes}" in rest
    right = [json.loads(folder.evaluation.read_text())["top1_correct"] for folder in (finished, other)]
    pair = rest[rest.index("image by image:") + 1]
    only = [int(number) for number in re.findall(r" on (\d+)", pair)] or [0, 0]  # both may be right on the same images
    assert only[0] - only[1] == right[0] - right[1]
    assert picture.read_text().count("<path") > 10
    assert text.endswith(f"figure written to {picture}")


def test_evaluations_of_files_and_of_other_images(finished: RunFolder, image_folder: Path, tmp_path: Path):
    weights = shutil.copy(finished.weights, tmp_path / "mine.safetensors")
    how = {"ckpt": weights, "data": str(image_folder), "image_size": 32, "workers": 0}
    for split in ("val", "train"):
        evaluate(EvalOptions(**how, split=split, output=tmp_path / f"{split}.json"))
    text = compare(CompareOptions(items=(str(finished.path), str(tmp_path / "val.json"))))
    assert "finished and val: both are right on the same images" in text
    assert text.splitlines()[2].split()[-2:] == ["–", "–"]  # neither time nor speed is known
    text = compare(CompareOptions(items=(str(tmp_path / "val.json"), str(tmp_path / "train.json"))))
    assert "image by image: not comparable; the images differ" in text


def test_an_item_that_cannot_be_compared_is_named(finished: RunFolder, tmp_path: Path):
    alone = shutil.copy(finished.weights, tmp_path / "mine.safetensors")
    (tmp_path / "no.json").write_text("{}")
    for items, message in [
        ((str(finished.path),), "nothing to compare; name at least two"),
        ((str(finished.path), "nowhere"), "nowhere: no such file or folder"),
        ((str(finished.path), alone), r"mine.safetensors has no eval.json of its own: python scripts/evaluate.py"),
        ((str(finished.path), str(tmp_path / "no.json")), r"no.json is not an evaluation; evaluate.py --output"),
    ]:
        with pytest.raises(UserError, match=message):
            compare(CompareOptions(items=items))
    with pytest.raises(UserError, match=r"--picture x.pdf: must end in"):
        CompareOptions(items=("a", "b"), picture=Path("x.pdf"))


def made_run(
    path: Path,
    correct: int,
    seed: int = 0,
    *,
    recipe: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    top1: tuple[float, ...] = (0.1, 0.2),
) -> str:
    """A run folder with the first `correct` of 400 images right, and a log of epochs with these accuracies."""
    path.mkdir(parents=True)
    run, fields = RunFolder(path), {"epochs": 2, "seed": seed, **(recipe or {})}
    data = {"source": "photos", "class_names": ["a", "b"], "fingerprint": {"train": "t", "val": "v"}}
    write_recipe(run, "tiny", replace(TINY, **fields), data, {"commit": "c", "world_size": 1, **(facts or {})})
    run.weights.write_bytes(f"{seed} {correct}".encode())
    right = base64.b64encode(np.packbits(np.arange(400) < correct)).decode()
    sizes = {"num_images": 400, "num_classes": 2, "image_size": 32, "resize_size": 36, "split": "val", "data": "photos"}
    counts = {"top1_correct": correct, "top1_accuracy": correct / 400, "top5_accuracy": 1.0, "top1_right": right}
    hashes = {"weights_sha256": hashlib.sha256(run.weights.read_bytes()).hexdigest(), "images_sha256": "v"}
    run.evaluation.write_text(json.dumps(sizes | counts | hashes | (evaluation or {})))
    for epoch, accuracy in enumerate(top1, 1):
        seconds = dict.fromkeys(("load_seconds", "train_seconds", "val_seconds"), 1.0)
        run.append({"kind": "epoch", "epoch": epoch, "step": epoch, "top1_accuracy": accuracy, **seconds})
    return str(path)


def section(items: list[str], title: str = "seeds") -> list[str]:
    """The lines of one section of what is printed, without its title."""
    parts = compare(CompareOptions(items=tuple(items))).split("\n\n")
    return next((part.splitlines()[1:] for part in parts if part.startswith(title)), [])


def test_seeds_by_hand(tmp_path: Path):
    """342 ± 2 and 334 ± 4 of 400 images. t = 8 / √(4/3 + 16/3) = 3.098 with
    (20/3)² / ((4/3)²/2 + (16/3)²/2) = 2.941 degrees of freedom: two-sided p = 0.055."""
    fast = [made_run(tmp_path / f"fast-{seed}", 340 + 2 * seed, seed) for seed in range(3)]
    slow = [made_run(tmp_path / f"slow-{seed}", 330 + 4 * seed, seed, recipe={"lr": 0.5}) for seed in range(3)]
    others = [made_run(tmp_path / name, 300, recipe={"lr": lr}) for name, lr in (("alone", 0.1), ("lonely", 0.2))]
    assert section([*fast, *slow, *others]) == [
        "  fast (seeds 0, 1, 2): top-1 85.50% ± 0.50%, n = 3",
        "  slow (seeds 0, 1, 2): top-1 83.50% ± 1.00%, n = 3",
        "  fast (seeds 0, 1, 2) minus slow (seeds 0, 1, 2): +2.00 points, the difference is not statistically "
        "significant (Welch's t-test, p = 0.055)",
    ]
    assert section([*fast, *slow, *others], "image by image") == [
        "  alone and lonely: both are right on the same images"
    ]
    assert section([*fast, *slow, others[0]], "image by image") == []
    assert section([fast[0], slow[0], slow[1]])[0].startswith("  slow (seeds 0, 1): top-1 83.00% ± 0.71%, n = 2")


def test_without_two_seeds_there_are_no_means(tmp_path: Path):
    one, other = made_run(tmp_path / "a", 300, 0), made_run(tmp_path / "b", 310, 1, recipe={"lr": 0.5})
    for items in ([one, other], [one, one], [one, str(Path(one) / "eval.json")]):
        assert section(items) == []
        assert len(section(items, "image by image")) == 1


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"top1": (0.1,)}, "it is unfinished, epoch 1 of 2"),
        ({"seed": 1}, "it has the seed or the weights of sprint-1"),
        ({"correct": 310, "weights": "sprint-1"}, "it has the seed or the weights of sprint-1"),
        ({"evaluation": {"resize_size": 40}}, None),
        ({"evaluation": {"num_bad_images": 1}}, None),
        ({"evaluation": {"images_sha256": "w"}}, None),
    ],
    ids=["unfinished", "seed", "weights", "size", "bad", "images"],
)
def test_a_run_that_would_falsify_the_mean_is_left_out(change: dict, note: str | None, tmp_path: Path):
    items = [made_run(tmp_path / f"sprint-{seed}", 300 + 10 * seed, seed) for seed in range(2)]
    copied = change.pop("weights", None)
    items.append(made_run(tmp_path / "third", **{"correct": 390, "seed": 2, **change}))
    if copied:
        for name in ("model.safetensors", "eval.json"):
            shutil.copy(tmp_path / copied / name, tmp_path / "third")
    reason = f"is not counted: {note}" if note else "is not counted with sprint-0: other images or preprocessing"
    assert section(items) == ["  sprint (seeds 0, 1): top-1 76.25% ± 1.77%, n = 2", f"  third {reason}"]


@pytest.mark.parametrize(
    ("recipe", "facts"),
    [
        ({"lr": 0.5}, {}),
        ({}, {"world_size": 2}),
        ({}, {"mixed_precision": "bf16"}),
        ({}, {"init_from": {"checkpoint": "w.pth", "sha256": "5"}}),
        ({}, {"data": {"source": "photos", "class_names": ["a", "b"], "fingerprint": {"train": "u", "val": "v"}}}),
    ],
    ids=str,
)
def test_runs_that_differ_in_more_than_the_seed_have_no_common_mean(recipe: dict, facts: dict, tmp_path: Path):
    one, two = made_run(tmp_path / "a-0", 300, 0), made_run(tmp_path / "a-1", 310, 1)
    third = made_run(tmp_path / "a-2", 390, 2, recipe=recipe, facts=facts)
    assert section([one, third, two]) == ["  a (seeds 0, 1): top-1 76.25% ± 1.77%, n = 2"]


def test_a_run_that_stopped_early_is_finished(tmp_path: Path):
    stops = {"early_stopping_epochs": 2, "epochs": 9}
    items = [made_run(tmp_path / f"a-{seed}", 300, seed, recipe=stops, top1=(0.1, 0.3, 0.3, 0.2)) for seed in range(2)]
    interrupted = made_run(tmp_path / "a-2", 300, 2, recipe=stops, top1=(0.1, 0.3, 0.2))
    assert section([interrupted, *items]) == [
        "  a (seeds 0, 1): top-1 75.00% ± 0.00%, n = 2",
        "  a-2 is not counted: it is unfinished, epoch 3 of 9",
    ]


def test_groups_on_other_images_are_not_subtracted_and_are_named_unambiguously(tmp_path: Path):
    """Folders of the same names get their paths; numbers that are not the seeds stay; other commits are reported."""
    items = []
    for seed in range(2):
        items.append(made_run(tmp_path / "a" / f"{seed}", 300, seed, facts={"commit": f"{seed}"}))
        items.append(made_run(tmp_path / "b" / f"{seed}", 300, seed, evaluation={"images_sha256": "w"}))
        items.append(made_run(tmp_path / f"resnet5{seed}", 340, seed, recipe={"lr": 0.5}))
    a, b, c = (f"{tmp_path}/{name}" for name in ("a (seeds 0, 1)", "b (seeds 0, 1)", "resnet50 (seeds 0, 1)"))
    assert section(items) == [
        f"  {a}: top-1 75.00% ± 0.00%, n = 2",
        "    the commits of the code differ",
        f"  {b}: top-1 75.00% ± 0.00%, n = 2",
        f"  {c}: top-1 85.00% ± 0.00%, n = 2",
        f"  {a} minus {b}: not comparable: other images or preprocessing",
        f"  {a} minus {c}: -10.00 points; no test, because top-1 does not vary over the seeds of either",
        f"  {b} minus {c}: not comparable: other images or preprocessing",
        f"  {tmp_path}/b/0 is not counted with {tmp_path}/a/0: other images or preprocessing",
    ]
