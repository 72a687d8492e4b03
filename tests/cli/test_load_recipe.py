"""--recipe of a run, from its folder or from a local Hub: trained again, and how far it came."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.hub_server import HubServer, Repo
from helpers.training import TINY

from resnet_in1k.cli import train
from resnet_in1k.cli.train import find_recipe
from resnet_in1k.evaluate.statistics import describe_paired
from resnet_in1k.hub.hub_folder import build_hub_folder
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.run_folder import RunFolder
from resnet_in1k.utils.errors import UserError
from resnet_in1k.utils.imagenet import names_by_wnid

REPO = "someone/resnet18-1.5"


@pytest.fixture
def original(finished: RunFolder, tmp_path: Path) -> RunFolder:
    copied = shutil.copytree(finished.path, tmp_path / "first", ignore=shutil.ignore_patterns("checkpoints"))
    return RunFolder(Path(copied))


def publish(hub: HubServer, run: RunFolder) -> None:
    hub.publish(REPO, {path.name: path.read_bytes() for path in build_hub_folder(run, REPO).iterdir()})


@pytest.mark.slow
def test_a_published_run_is_trained_again_to_the_same_weights(
    hub: HubServer, original: RunFolder, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    publish(hub, original)
    recorded = json.loads(original.evaluation.read_text())
    hub.requested.clear()
    command = ["scripts/train.py", "--recipe", f"hub:{REPO}", "--data", str(image_folder), "--workers", "0"]
    monkeypatch.setattr(sys, "argv", command)
    folder = RunFolder(train.main())
    assert not any("model.safetensors" in path for path in hub.requested), "the recipe needs no weights"
    assert folder.path == Path("runs/resnet18-1.5-reproduced")
    assert folder.weights.read_bytes() == original.weights.read_bytes()
    top1 = f"{recorded['top1_accuracy']:.2%}"
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith(f"hub:{REPO} published top-1 {top1}: here {top1}, the same (95% interval ")
    assert last_line.endswith(describe_paired((0, 0), "this run", f"hub:{REPO}"))


@pytest.fixture
def facts(original: RunFolder) -> dict:
    return json.loads(original.recipe.read_text())


INITIAL = {"checkpoint": "somewhere/base", "origin": "", "sha256": "00", "architecture": "resnet18", "head": "with its"}


def parsed(monkeypatch: pytest.MonkeyPatch, recipe: object) -> train.Arguments:
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--recipe", str(recipe)])
    return train.parse_flags()[1]


def test_of_another_run_on_this_machine_all_is_taken_over(original: RunFolder, facts: dict, monkeypatch):
    """Precision, data and accumulation too: as many images in each forward pass as there."""
    facts |= {"mixed_precision": "bf16", "world_size": 4}
    facts["data"] |= {"val_share": 0.25}
    original.recipe.write_text(json.dumps(facts))
    for path in (original.path, original.recipe):
        arguments = parsed(monkeypatch, path)
        assert arguments.fields == TINY
        options = arguments.options
        assert (options.data, options.val_share, options.precision) == (facts["data"]["source"], 0.25, "bf16")
        assert options.gradient_accumulation_steps == 4
        assert options.output_dir == Path("runs/first-reproduced")


@pytest.mark.parametrize("origin", ["timm/resnet18.a1_in1k", ""])
def test_the_initial_weights_are_those_of_the_run(original: RunFolder, facts: dict, monkeypatch, origin: str):
    original.recipe.write_text(json.dumps(facts | {"init_from": INITIAL | {"origin": origin}}))
    assert parsed(monkeypatch, original.path).options.init_from == (origin or "somewhere/base")


def test_initial_weights_that_are_not_published_must_be_given(hub, original: RunFolder, facts: dict, monkeypatch):
    original.recipe.write_text(json.dumps(facts | {"init_from": INITIAL}))
    publish(hub, original)
    with pytest.raises(UserError, match=rf"--recipe hub:{REPO} starts from trained weights: give --init-from"):
        parsed(monkeypatch, f"hub:{REPO}")


def test_what_is_no_recipe_is_one_line(hub: HubServer, original: RunFolder, facts: dict, tmp_path: Path):
    hub.repos["someone/none"] = Repo(private=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text(json.dumps({**facts, "world_size": None}))
    facts["recipe"]["name"] = "../../elsewhere"
    (tmp_path / "named.json").write_text(json.dumps(facts))
    for given, message in (
        ("hub:someone", "'someone' is not a repository; give hub:USER/NAME"),
        ("hub:someone/none", r"it has no recipe\.json; give a run folder"),
        ("hub:someone/nowhere", "no such repository could be downloaded"),
        (tmp_path / "empty", r"empty: it has no recipe\.json; give a run folder"),
        (tmp_path / "broken.json", r"broken\.json cannot be read \(TypeError"),
        (tmp_path / "named.json", r"cannot be read \(ValueError: recipe name '\.\./"),
        (original.log, r"no .*recipe\.json|cannot be read"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            find_recipe(str(given))
        assert "\n" not in str(caught.value)


def test_the_published_figure_of_a_named_recipe(original: RunFolder):
    """Only of ImageNet-1k's whole val split; here by a record as of one."""
    assert train.describe_outcome(find_recipe("tv1"), original) == ""
    result = json.loads(original.evaluation.read_text())
    result |= {"class_names": list(names_by_wnid()), "num_images": 50_000}
    result |= {"top1_correct": 38_000, "top1_accuracy": 0.76}
    original.evaluation.write_text(json.dumps(result))
    facts = json.loads(original.recipe.read_text())
    facts["data"]["num_train_images"] = 1_281_167
    facts["recipe"] = {"name": "tv1", **vars(replace(RECIPES["tv1"].recipe, seed=3))}
    original.recipe.write_text(json.dumps(facts))
    assert train.describe_outcome(find_recipe("tv1"), original) == (
        "published top-1 of tv1 76.13%: here 76.00%, 0.13 points lower (95% interval 75.62% to 76.37%); trained with "
        "seed 0 → 3"
    )
    assert train.describe_outcome(find_recipe("tutorial"), original) == ""  # nothing is published of it
