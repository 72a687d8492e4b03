from dataclasses import replace

import pytest
import torch

from resnet_in1k.core.errors import UserError
from resnet_in1k.optim.optimizers import OPTIMIZERS, build_optimizer, set_lr
from resnet_in1k.recipes.named import RECIPES
from resnet_in1k.recipes.recipe import Recipe


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_of_the_tutorial_is_sgd(fused: bool):
    """Against torch's plain SGD with the numbers written out, over steps of a changing learning rate."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, replace(RECIPES["tutorial"].recipe, weight_decay=0.01), fused=fused)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert bool(optimizer.param_groups[0]["fused"]) == fused
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False)
    inputs = torch.randn(8, 5)
    for lr in (0.1, 0.1, 0.02):
        set_lr(optimizer, lr)
        reference.param_groups[0]["lr"] = lr
        for model, sgd in ((ours, optimizer), (theirs, reference)):
            sgd.zero_grad()
            model(inputs).square().mean().backward()
            sgd.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_lr_is_set_in_every_group():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]]}], lr=2.0)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_new_optimizer_is_made_from_model_recipe_and_fused(tiny: Recipe, monkeypatch: pytest.MonkeyPatch):
    def adam(model: torch.nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=fused)

    monkeypatch.setitem(OPTIMIZERS, "adam", adam)
    model = torch.nn.Linear(2, 2)
    for fused in (True, False):
        optimizer = build_optimizer(model, replace(tiny, optimizer="adam", lr=0.25), fused=fused)
        assert isinstance(optimizer, torch.optim.Adam)
        assert optimizer.param_groups[0]["params"] == list(model.parameters())
        assert (optimizer.defaults["lr"], optimizer.defaults["fused"]) == (0.25, fused)


def test_misspelt_optimizer_gets_a_suggestion(tiny: Recipe):
    with pytest.raises(UserError, match=r"^--optimizer sdg: must be one of sgd; perhaps you meant sgd$"):
        build_optimizer(torch.nn.Linear(2, 2), replace(tiny, optimizer="sdg"))
