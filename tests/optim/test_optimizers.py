import copy
import functools
from dataclasses import replace

import pytest
import timm.optim
import torch

from resnet_in1k.model.resnet import ResNet
from resnet_in1k.optim import muon
from resnet_in1k.optim.optimizers import OPTIMIZERS, parameter_groups
from resnet_in1k.recipes.published import RECIPES
from resnet_in1k.recipes.recipe import Recipe


class Net(torch.nn.Module):
    """Two convolutions of one shape, a norm whose name says nothing, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.twin = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.between = torch.nn.BatchNorm2d(4)
        self.bn_like = torch.nn.Linear(4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.bn_like(self.between(self.conv(images) * self.twin(images)).mean(dim=(2, 3)))


def make(net: torch.nn.Module, recipe: Recipe, fused: bool = True) -> torch.optim.Optimizer:
    return OPTIMIZERS[recipe.optimizer](parameter_groups(net, recipe), recipe, fused)


@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("decay_biases", [True, False])
def test_weight_decay_is_off_by_the_type_of_the_module(tiny: Recipe, decay_norms: bool, decay_biases: bool):
    net = Net()
    recipe = replace(tiny, decay_norms=decay_norms, decay_biases=decay_biases, weight_decay=0.1)
    optimizer = make(net, recipe)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(parameter)] for name, parameter in net.named_parameters()}
    assert names == {
        "conv.weight": 0.1,
        "twin.weight": 0.1,
        "between.weight": 0.1 * decay_norms,
        "between.bias": 0.1 * decay_norms,
        "bn_like.weight": 0.1,
        "bn_like.bias": 0.1 * decay_biases,
    }


REFERENCES = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.8, nesterov=True, weight_decay=0.1, foreach=False),
    "sgdw": lambda groups: timm.optim.SGDW(groups, 0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.05, weight_decay=0.1, foreach=False),
    "lamb": lambda groups: timm.optim.Lamb(groups, 0.05, weight_decay=0.1, max_grad_norm=None),
    "lars": lambda groups: timm.optim.Lars(groups, 0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
    "muon": lambda groups: timm.optim.Muon(
        [
            {"params": groups[0]["params"][:2]},
            {"params": groups[0]["params"][2:], "use_fallback": True},
            groups[1],  # vectors, for which it takes AdamW by itself
        ],
        *(0.05, 0.1, 0.8, True),
    ),
}


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_optimizer_is_its_librarys_over_ten_steps(tiny: Recipe, name: str, monkeypatch: pytest.MonkeyPatch):
    """With the settings written out, without decay on vectors, at a rate that falls; Muon in float32."""
    exact = functools.partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", exact)
    monkeypatch.setattr(muon, "fastest_precision", lambda device: "no")
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}
    recipe = replace(tiny, optimizer=name, **settings, decay_norms=False, decay_biases=False)
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    others = [p for p in theirs.parameters() if p.ndim > 1]
    reference = REFERENCES[name]([{"params": others}, {"params": vectors, "weight_decay": 0.0}])
    optimizer = make(ours, recipe, name in ("sgd", "adamw"))
    start = ours.conv.weight.detach().clone()
    images = torch.randn(8, 3, 6, 6)
    for step in range(10):
        for net, each in ((ours, optimizer), (theirs, reference)):
            for group in each.param_groups:
                group["lr"] = 0.05 * (1 - step / 20)
            each.zero_grad()
            net(images).square().mean().backward()
            each.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours.conv.weight, start, atol=1e-4)


def test_layer_lr_decay_is_timms(tiny: Recipe):
    """A factor for the stem, for each residual block, and 1 for the last layer."""
    theirs = timm.create_model("resnet18", num_classes=3)
    groups = timm.optim.param_groups_layer_decay(theirs, weight_decay=0.1, layer_decay=0.7)
    expected = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    ours = ResNet("resnet18", 3)
    made = parameter_groups(ours, replace(tiny, layer_lr_decay=0.7, weight_decay=0.1, decay_norms=False))
    found = {id(parameter): group.get("lr_factor", 1.0) for group in made for parameter in group["params"]}
    names = [name for name, _ in theirs.named_parameters()]
    assert names == [name for name, _ in ours.named_parameters()]
    for one, other, name in zip(ours.parameters(), theirs.parameters(), names, strict=True):
        assert found[id(one)] == pytest.approx(expected[id(other)]), name
    assert found[id(ours.conv1.weight)] == pytest.approx(0.7**9)


@pytest.mark.parametrize("shape", [(64, 147), (256, 64), (96, 96), (32, 288)])
def test_orthogonalize_is_the_plain_iteration_in_float64(shape: tuple[int, int]):
    """For wide, tall and square matrices, with singular values down to 1e-4 of the largest, several at once."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=generator) * torch.logspace(0, -4, shape[1])
    coefficients = timm.optim.muon._COEFFICIENTS["quintic"]
    expected = timm.optim.muon.zeropower_via_newtonschulz(matrices.double(), 5, coefficients, dtype=torch.float64)
    found = muon.orthogonalize(matrices, torch.float32)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    coarse = muon.orthogonalize(matrices, torch.bfloat16)
    assert 1e-3 < (coarse - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lamb"])
def test_parameters_that_were_frozen_begin_as_if_anew(name: str):
    """After steps of the last layer alone, the others' first step is that of an optimizer made then.

    timm's LAMB counts steps by group, frozen or not: its first steps are smaller.
    """
    torch.manual_seed(0)
    recipe = replace(RECIPES["finetune"].recipe, optimizer=name, head_lr_factor=1.0)
    ours = ResNet("resnet18", 3)
    optimizer = make(ours, recipe)
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
    make(fresh, recipe).step()
    for (key, weights), expected in zip(ours.named_parameters(), fresh.parameters(), strict=True):
        if not key.startswith("fc"):
            assert torch.equal(weights, expected), key
