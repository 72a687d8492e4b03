import sys

import pytest

from resnet_in1k.cli import train
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils.errors import UserError


def parse(monkeypatch, *arguments: str) -> train.Arguments:
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", *arguments])
    return train.parse_flags()[1]


def parsed_recipe(monkeypatch, *arguments: str) -> Recipe:
    return parse(monkeypatch, *arguments).fields


def test_defaults_are_those_of_the_named_recipe(monkeypatch):
    for name, named in RECIPES.items():
        given = ["--init-from", "runs/base"] if named.needs_weights else []
        arguments = parse(monkeypatch, "--recipe", name, *given)
        assert (arguments.recipe, arguments.fields, arguments.options.data) == (name, named.recipe, named.default_data)
    assert parse(monkeypatch).recipe == "tutorial"


def test_fields_of_recipe_and_options_are_flags(monkeypatch):
    arguments = parse(monkeypatch, "--recipe=demo", "--lr", "0.5", "--no-zero-init-residual", "--workers", "0")
    assert (arguments.fields.lr, arguments.fields.zero_init_residual, arguments.options.workers) == (0.5, False, 0)


def test_values_out_of_range_are_refused_all_at_once(monkeypatch):
    with pytest.raises(
        UserError, match=r"invalid recipe: lr must be above 0, not 0\.0; hue must be at least 0 and at most 0\.5"
    ):
        parse(monkeypatch, "--lr", "0", "--hue", "2")
    with pytest.raises(UserError, match="--log-every 0: must be at least 1"):
        parse(monkeypatch, "--log-every", "0")


def test_recipes_can_be_listed_without_the_weights_that_one_needs(monkeypatch):
    assert parse(monkeypatch, "--recipe", "linear-probe", "--list-recipes").list_recipes


def test_defaults_follow_the_batch_epochs_and_image_size(monkeypatch):
    """By the recipe's rule and in proportion, by hand: a3's rule is the root, and it warms up for 5 of 100 epochs."""
    of_512 = ["--recipe", "a3", "--global-batch-size=512"]
    recipe = parsed_recipe(monkeypatch, *of_512, "--epochs", "20")
    assert (recipe.lr, recipe.warmup_epochs) == (pytest.approx(4e-3), pytest.approx(1))
    assert parsed_recipe(monkeypatch, *of_512, "--lr", "0.1").lr == 0.1
    assert parsed_recipe(monkeypatch, *of_512, "--lr-batch-rule", "linear").lr == pytest.approx(2e-3)

    of_45_epochs = ["--recipe", "tv1", "--epochs", "45"]
    recipe = parsed_recipe(monkeypatch, *of_45_epochs, "--global_batch_size", "512")
    assert (recipe.lr, recipe.lr_milestones) == (pytest.approx(0.2), (15, 30))
    recipe = parsed_recipe(monkeypatch, *of_45_epochs, "--lr-milestones", "40", "--image-size", "112")
    assert (recipe.lr, recipe.lr_milestones, recipe.image_size) == (0.1, (40,), 112)
    for epochs in ("30", "40"):  # a run of the schedule `step` may grow: nothing but the epochs changes
        assert parsed_recipe(monkeypatch, "--epochs", epochs).fingerprint() == RECIPES["tutorial"].recipe.fingerprint()


@pytest.mark.parametrize(
    ("batch", "processes", "steps"),
    [("2048", "1", 8), ("2048", "2", 4), ("256", "1", 1), ("8", "2", 1), ("1000", "1", 4)],
)
def test_accumulation_follows_the_images_of_a_forward_pass(monkeypatch, batch: str, processes: str, steps: int):
    """one-gpu-24gb: at most 256 at once."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    options = parse(monkeypatch, "--recipe", "one-gpu-24gb", "--global-batch-size", batch).options
    assert options.gradient_accumulation_steps == steps
    given = parse(monkeypatch, "--recipe", "one-gpu-24gb", "--gradient-accumulation-steps", "2")
    assert given.options.gradient_accumulation_steps == 2


def test_recipes_are_listed_with_what_is_published_of_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--list-recipes"])
    assert train.main() is None
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["recipe", "epochs", "px", "batch"]
    rows = {line.split()[0]: line.split() for line in lines[: len(RECIPES)]}
    assert rows.keys() == RECIPES.keys()
    assert rows["a3"][:8] == ["a3", "100", "160", "2048", "78.052", "93.78", "60", "4"]
    assert rows["budget-16"][1:4] == ["16", "160-192", "4096"]
    assert rows["tutorial"][4] == "–"
    sources = {line.split()[0]: line for line in lines[len(RECIPES) + 2 :] if line.startswith("  ")}
    assert sources.keys() == RECIPES.keys()
    assert "https://arxiv.org/abs/2110.00476" in sources["a1"]
