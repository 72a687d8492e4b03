from dataclasses import replace

import pytest
import torch

from resnet_in1k.optim import build_optimizer, lr_at, set_lr
from resnet_in1k.recipes import DEMO, TUTORIAL


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(1, 0.1), (5, 0.1), (6, 0.02), (10, 0.02), (11, 0.004), (15, 0.004), (16, 0.0008), (20, 0.0008)],
)
def test_the_tutorials_schedule(epoch: int, expected: float):
    """× 0.2 every 5 epochs, at 5004 steps an epoch as with 1,281,167 images in batches of 256."""
    for step in ((epoch - 1) * 5004 + 1, epoch * 5004):
        assert lr_at(step, TUTORIAL, 5004) == pytest.approx(expected, rel=1e-12)


def test_warmup_then_cosine_by_hand():
    recipe = replace(DEMO, lr=0.4, lr_schedule="cosine", warmup_epochs=1, epochs=5)
    # Four steps an epoch: four of warm-up, then sixteen from cos 0 on.
    assert [lr_at(step, recipe, 4) for step in (1, 2, 3, 4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert lr_at(5, recipe, 4) == pytest.approx(0.4)  # cos 0
    assert lr_at(9, recipe, 4) == pytest.approx(0.2 * (1 + 2**-0.5))  # cos 45°
    assert lr_at(13, recipe, 4) == pytest.approx(0.2)  # cos 90°
    assert 0 < lr_at(20, recipe, 4) < 0.004  # one step before zero


def test_half_an_epoch_of_warmup_before_steps():
    recipe = replace(TUTORIAL, lr=1.0, warmup_epochs=0.5)
    assert [lr_at(step, recipe, 4) for step in (1, 2, 3, 20, 21)] == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.2])


def test_optimizer_is_the_tutorials_sgd():
    """Against torch's plain SGD with the numbers written out, over steps of a changing learning rate."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, TUTORIAL)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
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
