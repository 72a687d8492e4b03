from pathlib import Path

import pytest
import torch
import torchvision

from resnet_in1k import ResNet
from resnet_in1k.model.resnet import LAYOUTS, load_model
from resnet_in1k.model.weights import weights_to_save, write_tensors
from resnet_in1k.utils.errors import UserError


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_has_torchvisions_keys_and_shapes(architecture: str):
    with torch.device("meta"):
        ours = ResNet(architecture, num_classes=7).state_dict()
        theirs = getattr(torchvision.models, architecture)(num_classes=7).state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [(key, value.shape) for key, value in theirs.items()]


@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_starts_with_torchvisions_weights_and_gives_its_logits(zero_init_residual: bool):
    torch.manual_seed(0)
    ours = ResNet("resnet50", 10, zero_init_residual).eval()
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=10, zero_init_residual=zero_init_residual).eval()
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(inputs), theirs(inputs))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(), (0,), (0, 512), (10**9, 0)])
def test_a_last_layer_without_classes_is_refused(tmp_path: Path, shape: tuple):
    """Of no bytes, it could claim a billion classes, and their memory."""
    state = weights_to_save(ResNet("resnet18", num_classes=4))
    write_tensors({**state, "fc.weight": torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors has no last layer, fc.weight and fc.bias"):
        load_model(tmp_path)
