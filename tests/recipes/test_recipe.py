import dataclasses
import hashlib
import json
from dataclasses import asdict, replace
from typing import Literal, get_args, get_origin

import pytest

from resnet_in1k.data.crop import EvalPreprocessing
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe, crop_ratio_for, resize_size_for
from resnet_in1k.utils.errors import UserError

TUTORIAL, DEMO = (RECIPES[name].recipe for name in ("tutorial", "demo"))
PLAIN = {"model": "resnet18", "epochs": 3, "global_batch_size": 8, "lr": 1.0, "image_size": 64}
"""The fields that have no default."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2, "warmup_epochs": 3}, r"warmup_epochs \(3\.0\) must not exceed epochs \(2\)"),
        ({"initial_image_size": 96, "image_size_ramp_end": 2}, r"initial_image_size \(96\) must not exceed .* \(64\)"),
        (
            {"initial_image_size": 32, "image_size_ramp_start": 2, "image_size_ramp_end": 2},
            r"image_size_ramp_end \(2\) must be after image_size_ramp_start \(2\)",
        ),
        ({"lr_milestones": (2, 1)}, r"lr_milestones \[2\.0, 1\.0\] must increase"),
        ({"lr_schedule": "multi_step"}, "lr_schedule multi_step needs lr_milestones"),
        ({"lr_floor": 2}, r"lr_floor \(2\.0\) must not exceed lr \(1\.0\)"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"alternating_flip": True, "hflip_probability": 0.5}, "alternating_flip replaces .*, which must be 0"),
        ({"publish": "ema"}, "publish ema needs an ema_decay"),
        ({"publish": "emma"}, "publish must be one of model, ema, not 'emma'"),
    ],
)
def test_fields_that_contradict_one_another_are_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=rf"^invalid recipe: {message}$"):
        Recipe(**{**PLAIN, **changes})


def test_whole_numbers_and_floats_are_the_same_recipe():
    """As from code and from flags, which know of a float that it is one."""
    whole = replace(DEMO, warmup_epochs=1, rotation_degrees=10)
    decimal = replace(DEMO, warmup_epochs=1.0, rotation_degrees=10.0)
    assert whole == decimal
    assert whole.fingerprint() == decimal.fingerprint()
    assert json.dumps(asdict(whole)) == json.dumps(asdict(decimal))


def test_fingerprint_covers_what_is_switched_on():
    """By hand: checkpoints record it, so it must stay the same for a recipe that stays the same."""
    recipe = Recipe(**PLAIN, lr_schedule="cosine", momentum=0.9, label_smoothing=0.0)
    on = {**PLAIN, "lr_schedule": "cosine", "momentum": 0.9}
    assert recipe.non_default_fields() == on
    assert recipe.fingerprint() == hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()
    step = replace(recipe, lr_schedule="step")
    without_epochs = {name: on[name] for name in on if name not in ("epochs", "lr_schedule")}
    assert step.fingerprint() == hashlib.sha256(json.dumps(without_epochs, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Recipe)])
def test_fingerprint_changes_with_every_field(name: str):
    recipe = replace(DEMO, initial_image_size=16, image_size_ramp_end=3, lr=0.5, hflip_probability=0, ema_decay=0.9)
    recipe = replace(recipe, rand_augment_magnitude=8)
    value = getattr(recipe, name)
    (field,) = (each for each in dataclasses.fields(Recipe) if each.name == name)
    if get_origin(field.type) is Literal:
        changed = next(choice for choice in get_args(field.type) if choice != value)
    elif isinstance(value, str):
        changed = value + "x"
    elif isinstance(value, tuple):
        changed = (1.5,)
    elif isinstance(value, bool):
        changed = not value
    else:
        changed = value / 2 if isinstance(value, float) and value else value + (1 if isinstance(value, int) else 0.1)
    same = replace(recipe, **{name: changed}).fingerprint() == recipe.fingerprint()
    assert same == (name == "lr_batch_rule")  # it says what the command line does, no step depends on it


def test_epochs_may_grow_where_the_schedule_does_not_depend_on_them():
    longer = replace(TUTORIAL, epochs=30)
    assert TUTORIAL.fingerprint() == longer.fingerprint()
    assert TUTORIAL.differences(replace(longer, lr=0.2)) == ["epochs 20 → 30", "lr 0.1 → 0.2"]
    assert DEMO.fingerprint() != replace(DEMO, epochs=30).fingerprint()


@pytest.mark.parametrize(
    ("changes", "size", "resize_size"),
    [
        ({}, 64, 73),  # 64 / 0.875 = 73.14
        ({"eval_image_size": 224}, 224, 256),
        ({"eval_crop_ratio": 1}, 64, 64),
        ({"eval_image_size": 80, "eval_crop_ratio": 0.8}, 80, 100),
    ],
)
def test_sizes_of_evaluation(changes: dict, size: int, resize_size: int):
    preprocessing = EvalPreprocessing.from_recipe(Recipe(**PLAIN, **changes))
    assert (preprocessing.image_size, preprocessing.resize_size) == (size, resize_size)


def test_crop_ratio_makes_the_same_resize_again():
    """By timm's own rule, floor(size / crop_pct), for all sizes that are likely."""
    for size in range(32, 321, 8):
        for resize_size in range(size, size + 65):
            ratio = crop_ratio_for(size, resize_size)
            assert int(size / ratio) == resize_size_for(size, ratio) == resize_size
    assert crop_ratio_for(224, 256) == 0.875
    assert crop_ratio_for(224, 232) == pytest.approx(224 / 232)


def test_fingerprint_covers_the_weights_that_a_run_starts_from():
    assert len({TUTORIAL.fingerprint(), TUTORIAL.fingerprint("aa"), TUTORIAL.fingerprint("bb")}) == 3
