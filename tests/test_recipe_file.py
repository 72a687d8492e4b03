"""recipe.json: of this version, of the first one, and of later ones."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.run_folder import RunFolder, read_recipe, write_recipe
from resnet_in1k.utils.errors import UserError

VERSION_1 = {
    "format_version": 1,
    "recipe": {
        "name": "tutorial",
        "model": "resnet18",
        "epochs": 2,
        "global_batch_size": 50,
        "image_size": 64,
        "lr": 0.1,
        "lr_schedule": "step",
        "lr_step_epochs": 5,
        "lr_step_factor": 0.2,
        "momentum": 0.9,
        "crop_scale_min": 0.08,
        "hflip_probability": 0.5,
        "rotation_degrees": 10.0,
        "hue": 0.2,
    },
    "data": {"source": "data/imagenette", "num_train_images": 1000, "class_names": ["n01440764", "n02102040"]},
    "world_size": 1,
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "commit": "252060dd21ce",
}
"""The first version of the format: recipes had fewer fields."""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_a_recipe_is_read_as_it_was_written(run: RunFolder, tiny: Recipe):
    recipe = replace(tiny, eval_interpolation="bicubic", initial_image_size=16, image_size_ramp_end=2)
    write_recipe(run, "tiny", recipe, {"source": "digits"}, {"world_size": 2})
    read, facts = read_recipe(run)
    assert read == recipe
    assert (facts["recipe"]["name"], facts["data"]["source"], facts["world_size"]) == ("tiny", "digits", 2)
    assert facts["format_version"] == 3


def test_the_first_version_is_read_with_later_fields_switched_off(run: RunFolder):
    run.recipe.write_text(json.dumps(VERSION_1))
    recipe, facts = read_recipe(run)
    written = {name: value for name, value in VERSION_1["recipe"].items() if name != "name"}
    assert {name: getattr(recipe, name) for name in written} == written
    later = {field.name: field for field in dataclasses.fields(Recipe) if field.name not in written}
    assert later.keys() >= {"optimizer", "loss", "initial_image_size", "eval_image_size", "eval_interpolation"}
    assert {name: getattr(recipe, name) for name in later} == {name: each.default for name, each in later.items()}
    assert EvalPreprocessing.from_recipe(recipe) == EvalPreprocessing(64, 73)
    assert facts == VERSION_1


@pytest.mark.parametrize("version", [4, "2"])
def test_another_version_is_refused_in_one_line(run: RunFolder, version: object):
    run.recipe.write_text(json.dumps({**VERSION_1, "format_version": version}))
    message = rf"recipe.json has format version {version!r}, newer than this resnet-in1k: update it$"
    with pytest.raises(UserError, match=message) as error:
        read_recipe(run)
    assert "\n" not in str(error.value)


def test_unknown_fields_are_refused_by_name(run: RunFolder):
    recipe = {**VERSION_1["recipe"], "xyz": 0.2, "abc": 0.1}
    run.recipe.write_text(json.dumps({**VERSION_1, "recipe": recipe}))
    message = r"unknown recipe fields: abc, xyz; update resnet-in1k$"
    with pytest.raises(UserError, match=message):
        read_recipe(run)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\x00", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'format_version'"),
        ('{"format_version": 2, "recipe": {"lr": 3}}', "TypeError.*model"),
    ],
)
def test_an_unreadable_recipe_is_named(run: RunFolder, text: str, reason: str):
    run.recipe.write_text(text)
    with pytest.raises(UserError, match=rf"recipe.json cannot be read \({reason}"):
        read_recipe(run)
