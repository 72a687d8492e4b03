"""Parts of a ResNet for training only: stochastic depth, synchronized batch norm, a frozen body."""

import functools

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_in1k.model.resnet import ResNet
from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import rng
from resnet_in1k.utils.rng import Stream


class StochasticDepth:
    """Skip residual branches of images in training, drawn for (seed, step) (https://arxiv.org/abs/1603.09382).

    It works by hooks on the last norm of each branch: modules, keys and evaluation stay torchvision's.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe):
        blocks = [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]
        self._seed, self._global_batch_size = recipe.seed, recipe.global_batch_size
        self._keep = 1 - recipe.stochastic_depth * torch.arange(len(blocks)) / (len(blocks) - 1)
        self.factors = torch.ones(0, len(blocks))  # of the next forward pass, one row an image
        for number, block in enumerate(blocks):
            last_norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            last_norm.register_forward_hook(functools.partial(self._scale, number))

    def draw(self, step: int) -> Tensor:
        """Draw for a global batch: (B, blocks) on the CPU, 0 where the image skips the branch, else the inverse of the
        probability that it does not."""
        generator = rng.generator(self._seed, Stream.STOCHASTIC_DEPTH, step)
        kept = torch.rand(self._global_batch_size, len(self._keep), generator=generator) < self._keep
        return (kept / self._keep).float()

    def _scale(self, number: int, norm: torch.nn.Module, _: object, branch: Tensor) -> Tensor | None:
        if not norm.training:
            return None
        return branch * self.factors[:, number].view(-1, 1, 1, 1).to(branch.dtype)


def synchronize_norms(model: torch.nn.Module) -> None:
    """Make all batch norms use the statistics of all processes. Keys and tensors stay; needs a process group."""
    for module in model.modules():
        if type(module) is torch.nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d


class SyncBatchNorm2d(torch.nn.BatchNorm2d):
    """BatchNorm2d with the mean and variance over the images of all processes, equally many on each.

    torch's SyncBatchNorm does not work on a CPU, and on a GPU it makes the host wait in each layer.
    """

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        world_size = dist.get_world_size()
        values = images.to(torch.promote_types(images.dtype, torch.float32))
        mean = _SumOverProcesses.apply(values.mean(dim=(0, 2, 3))) / world_size
        centered = values - mean.view(-1, 1, 1)
        variance = _SumOverProcesses.apply(centered.square().mean(dim=(0, 2, 3))) / world_size
        normalized = centered * (variance + self.eps).rsqrt().view(-1, 1, 1)
        result = normalized * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        count = world_size * images.numel() / images.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return result.to(images.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """A sum that each process uses, so its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradient)


class FrozenBody(torch.nn.Module):
    """The model in eval mode, except that its last layer trains: the only parameters are those of the last layer."""

    def __init__(self, model: ResNet):
        super().__init__()
        *body, self.fc = model.children()
        self._body = (torch.nn.Sequential(*body, torch.nn.Flatten()),)  # in a tuple it is not a submodule

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self._body[0].eval()(images)  # (B, F)
        return self.fc(features)
