from dataclasses import replace

import pytest
import torch
from torchvision.ops import stochastic_depth

from resnet_in1k.augment.pipeline import Augmentation
from resnet_in1k.model.layers import StochasticDepth
from resnet_in1k.model.resnet import ResNet
from resnet_in1k.recipes.recipe import Recipe


def depth_of(model: torch.nn.Module, recipe: Recipe) -> StochasticDepth:
    return StochasticDepth(model, replace(recipe, stochastic_depth=0.5))


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_keys_and_evaluation_are_those_of_the_plain_network(tiny: Recipe, architecture: str):
    torch.manual_seed(0)
    plain, model = ResNet(architecture, 4), ResNet(architecture, 4)
    model.load_state_dict(plain.state_dict())
    depth_of(model, tiny)
    assert list(model.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_branches_are_dropped_as_torchvision_drops_them(tiny: Recipe, architecture: str, monkeypatch):
    """Each block's branch in torchvision's own network through its own stochastic_depth, with the same draws."""
    torch.manual_seed(0)
    model, reference = ResNet(architecture, 4), ResNet(architecture, 4)
    reference.load_state_dict(model.state_dict())
    recipe = replace(tiny, global_batch_size=6)
    depth = depth_of(model, recipe)
    factors = depth.draw(3)
    blocks = [m for name, m in reference.named_modules() if name.count(".") == 1 and name.startswith("layer")]
    number = len(blocks)
    assert factors.shape == (6, number)
    for place, block in enumerate(blocks):
        last = "bn3" if architecture == "resnet50" else "bn2"
        probability = 0.5 * place / (number - 1)

        def dropped(_: object, __: object, branch: torch.Tensor, place=place, probability=probability):
            kept = (factors[:, place] > 0).float().view(-1, 1, 1, 1)
            monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda noise, p: noise.copy_(kept))
            return stochastic_depth(branch, probability, "row")

        getattr(block, last).register_forward_hook(dropped)
    images = torch.randn(6, 3, 32, 32)
    depth.factors = factors
    ours = model.train()(images)
    torch.testing.assert_close(ours, reference.train()(images), rtol=1e-4, atol=1e-5)
    assert (factors == 0).any()


def test_draws_are_of_the_global_batch_and_of_the_step(tiny: Recipe):
    recipe, model = replace(tiny, global_batch_size=12), ResNet("resnet18", 4)
    depth = depth_of(model, recipe)
    whole = depth.draw(5)
    assert torch.equal(depth_of(model, recipe).draw(5), whole)
    assert not torch.equal(depth.draw(6), whole)
    for num_processes in (2, 3):
        images = torch.zeros(12 // num_processes, 3, 8, 8, dtype=torch.uint8)
        labels = torch.zeros(len(images), dtype=torch.int64)
        shares = [
            Augmentation(recipe, 4, rank, num_processes, lambda step: {"factors": depth.draw(step)})(images, labels, 5)
            for rank in range(num_processes)
        ]
        assert torch.equal(torch.cat([factors for _, _, factors in shares]), whole)


def test_the_probability_grows_with_depth(tiny: Recipe):
    """From 0 at the first block to the recipe's at the last; what is kept is scaled up, so that the mean stays."""
    model = ResNet("resnet18", 4)
    factors = depth_of(model, replace(tiny, global_batch_size=40_000)).draw(1)
    skipped = (factors == 0).float().mean(dim=0)
    assert skipped.tolist() == pytest.approx([0.5 * place / 7 for place in range(8)], abs=0.01)
    assert factors.mean(dim=0).tolist() == pytest.approx([1.0] * 8, abs=0.02)
