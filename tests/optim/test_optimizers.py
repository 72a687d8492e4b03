import copy
from dataclasses import replace

import pytest
import timm.optim
import torch

from resnet_in1k.model.resnet import ResNet
from resnet_in1k.optim.optimizers import OPTIMIZERS, build_optimizer, parameter_groups, set_lr
from resnet_in1k.recipes.published import RECIPES
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


class Net(torch.nn.Module):
    """A convolution, a norm whose name says nothing, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.between = torch.nn.BatchNorm2d(4)
        self.bn_like = torch.nn.Linear(4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.bn_like(self.between(self.conv(images)).mean(dim=(2, 3)))


@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("decay_biases", [True, False])
def test_weight_decay_is_off_by_the_type_of_the_module(tiny: Recipe, decay_norms: bool, decay_biases: bool):
    net = Net()
    recipe = replace(tiny, decay_norms=decay_norms, decay_biases=decay_biases, weight_decay=0.1)
    optimizer = build_optimizer(net, recipe)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(parameter)] for name, parameter in net.named_parameters()}
    assert names == {
        "conv.weight": 0.1,
        "between.weight": 0.1 * decay_norms,
        "between.bias": 0.1 * decay_norms,
        "bn_like.weight": 0.1,
        "bn_like.bias": 0.1 * decay_biases,
    }


def test_parameters_without_decay_are_torchvisions_and_timms_on_a_resnet(tiny: Recipe):
    """torchvision's reference counts norms only, timm all vectors: on a ResNet vectors are norms' and the fc's bias."""
    from timm.optim import param_groups_weight_decay
    from torchvision.models import resnet18

    net = resnet18()
    without = [p for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    groups = parameter_groups(net, replace(tiny, decay_norms=False))
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in without}
    groups = parameter_groups(net, replace(tiny, decay_norms=False, decay_biases=False))
    theirs = param_groups_weight_decay(net, 0.1)
    for ours, group in zip(groups[::-1], theirs, strict=True):
        assert {id(p) for p in ours["params"]} == {id(p) for p in group["params"]}


REFERENCES = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.8, nesterov=True, weight_decay=0.1, foreach=False),
    "sgdw": lambda groups: timm.optim.SGDW(groups, 0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.05, weight_decay=0.1, foreach=False),
    "lamb": lambda groups: timm.optim.Lamb(groups, 0.05, weight_decay=0.1, max_grad_norm=None),
    "lars": lambda groups: timm.optim.Lars(groups, 0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
    "muon": lambda groups: timm.optim.Muon(
        [
            {"params": groups[0]["params"][:1]},
            {"params": groups[0]["params"][1:], "use_fallback": True},
            groups[1],  # vectors, for which it takes AdamW by itself
        ],
        *(0.05, 0.1, 0.8, True),
    ),
}


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_optimizer_is_its_librarys_over_ten_steps(tiny: Recipe, name: str):
    """With the settings written out, without decay on vectors, at a rate that falls."""
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    recipe = replace(
        tiny,
        optimizer=name,
        lr=0.05,
        momentum=0.8,
        nesterov=True,
        weight_decay=0.1,
        decay_norms=False,
        decay_biases=False,
    )
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    others = [p for p in theirs.parameters() if p.ndim > 1]
    reference = REFERENCES[name]([{"params": others}, {"params": vectors, "weight_decay": 0.0}])
    optimizer = build_optimizer(ours, recipe, fused=name in ("sgd", "adamw"))
    start = ours.conv.weight.detach().clone()
    images = torch.randn(8, 3, 6, 6)
    for step in range(10):
        for net, each in ((ours, optimizer), (theirs, reference)):
            set_lr(each, 0.05 * (1 - step / 20))
            each.zero_grad()
            net(images).square().mean().backward()
            each.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours.conv.weight, start, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lamb"])
def test_parameters_that_were_frozen_begin_as_if_anew(name: str):
    """After steps of the last layer alone, the others' first step is that of an optimizer made then.

    timm's LAMB counts steps by group, frozen or not: its first steps are smaller.
    """
    torch.manual_seed(0)
    recipe = replace(RECIPES["finetune"].recipe, optimizer=name, head_lr_factor=1.0)
    ours = ResNet("resnet18", 3)
    optimizer = build_optimizer(ours, recipe)
    for _ in range(3):
        for parameter in ours.fc.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    fresh = copy.deepcopy(ours)
    for parameter, other in zip(ours.parameters(), fresh.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.clone()
    optimizer.step()
    build_optimizer(fresh, recipe).step()
    for (key, weights), expected in zip(ours.named_parameters(), fresh.parameters(), strict=True):
        if not key.startswith("fc"):
            assert torch.equal(weights, expected), key
