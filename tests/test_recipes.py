from dataclasses import replace

import pytest

from resnet_in1k.errors import UserError
from resnet_in1k.recipes import DEFAULT_DATA, DEMO, RECIPES, TUTORIAL


def test_the_tutorials_numbers():
    assert TUTORIAL.model == "resnet50"
    assert (TUTORIAL.epochs, TUTORIAL.global_batch_size) == (20, 256)
    assert (TUTORIAL.lr, TUTORIAL.momentum, TUTORIAL.weight_decay) == (0.1, 0.9, 1e-4)
    assert (TUTORIAL.lr_schedule, TUTORIAL.lr_step_epochs, TUTORIAL.lr_step_factor) == ("step", 5, 0.2)
    assert (TUTORIAL.image_size, TUTORIAL.eval_resize_size, TUTORIAL.rotation_degrees) == (224, 256, 10)
    assert {getattr(TUTORIAL, name) for name in ("brightness", "contrast", "saturation", "hue")} == {0.2}
    assert (TUTORIAL.hflip_probability, TUTORIAL.crop_scale_min, TUTORIAL.label_smoothing) == (0.5, 0.08, 0)


def test_all_problems_are_reported_at_once():
    with pytest.raises(UserError) as error:
        replace(TUTORIAL, lr=-1, epochs=0, hue=0.6, weight_decay=float("nan"))
    for name in ("lr must be above 0", "epochs must be at least 1", "hue must be between 0 and 0.5", "weight_decay"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_warmup_may_not_outlast_the_run():
    with pytest.raises(UserError, match="warmup_epochs"):
        replace(DEMO, epochs=2, warmup_epochs=3)


def test_differences_name_what_an_override_changed():
    assert TUTORIAL.differences(replace(TUTORIAL, epochs=5, model="resnet18")) == [
        "model resnet50 → resnet18",
        "epochs 20 → 5",
    ]


def test_equal_recipes_have_equal_fingerprints():
    """As from code and from flags, which know of a float that it is one."""
    whole = replace(DEMO, warmup_epochs=1, rotation_degrees=10)
    decimal = replace(DEMO, warmup_epochs=1.0, rotation_degrees=10.0)
    assert whole == decimal
    assert whole.fingerprint() == decimal.fingerprint()


def test_epochs_may_grow_where_the_schedule_does_not_depend_on_them():
    longer = replace(TUTORIAL, epochs=30)
    assert TUTORIAL.objections_to(longer) == []
    assert TUTORIAL.fingerprint() == longer.fingerprint()
    assert longer.objections_to(TUTORIAL) == ["epochs 30 → 20"]
    assert TUTORIAL.objections_to(replace(longer, lr=0.2)) == ["epochs 20 → 30", "lr 0.1 → 0.2"]
    assert DEMO.objections_to(replace(DEMO, epochs=30)) == ["epochs 10 → 30"]


def test_every_recipe_knows_its_data():
    assert DEFAULT_DATA.keys() == RECIPES.keys()
