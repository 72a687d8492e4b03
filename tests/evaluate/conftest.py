"""Fixtures of the tests of evaluation."""

import pytest
import torch

from resnet_in1k.model.resnet import ResNet


@pytest.fixture(scope="module")
def model() -> ResNet:
    """Random weights for six classes."""
    torch.manual_seed(0)
    return ResNet("resnet18", num_classes=6).eval()
