import sys

import pytest

from resnet_in1k.commands import train
from resnet_in1k.core.errors import UserError
from resnet_in1k.recipes.named import RECIPES


def parse(monkeypatch, *arguments: str) -> train.Arguments:
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", *arguments])
    return train.parse()


def test_defaults_are_those_of_the_named_recipe(monkeypatch):
    for name, named in RECIPES.items():
        arguments = parse(monkeypatch, "--recipe", name)
        assert (arguments.recipe, arguments.what, arguments.how.data) == (name, named.recipe, named.default_data)
    assert parse(monkeypatch).recipe == "tutorial"


def test_fields_of_recipe_and_options_are_flags(monkeypatch):
    arguments = parse(monkeypatch, "--recipe=demo", "--lr", "0.5", "--no-zero-init-residual", "--workers", "0")
    assert (arguments.what.lr, arguments.what.zero_init_residual, arguments.how.workers) == (0.5, False, 0)


def test_values_out_of_range_are_refused_all_at_once(monkeypatch):
    with pytest.raises(
        UserError, match=r"invalid recipe: lr must be above 0, not 0\.0; hue must be between 0 and 0\.5"
    ):
        parse(monkeypatch, "--lr", "0", "--hue", "2")
    with pytest.raises(UserError, match="--log-every 0: must be at least 1"):
        parse(monkeypatch, "--log-every", "0")


def test_unknown_recipe_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(monkeypatch, "--recipe", "resnet")
    assert exit_.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
