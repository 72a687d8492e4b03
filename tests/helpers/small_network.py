"""A network small enough for tests of what is saved of it, and training steps without a recipe."""

import torch

from resnet_in1k.train.checkpoint import ModelGroup, OptimizerGroup, TensorGroup


class SmallNetwork(torch.nn.Module):
    """Enough of a ResNet for a checkpoint: a convolution, a norm with its buffers, a last layer."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.fc = torch.nn.Linear(16, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn1(self.conv1(images)).relu().mean(dim=(2, 3)))


def take_steps(network: SmallNetwork, optimizer: torch.optim.Optimizer, *steps: int) -> None:
    """Each step on images of its own, the same at each call."""
    for step in steps:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()


def groups_of(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, TensorGroup]:
    return {"model": ModelGroup(network), "optimizer": OptimizerGroup(network, optimizer)}


def all_tensors(groups: dict[str, TensorGroup]) -> dict[str, torch.Tensor]:
    """A copy of everything that a checkpoint of these groups would hold."""
    return {f"{group}/{name}": tensor for group in groups for name, tensor in groups[group].tensors().items()}


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
