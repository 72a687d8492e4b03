"""Stochastic depth (https://arxiv.org/abs/1603.09382): in training an image skips some residual branches.

By hooks on the last norm of each branch: no module, no key and no evaluation is other than torchvision's.
"""

import functools

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_in1k.recipes.recipe import Recipe
from resnet_in1k.utils import rng
from resnet_in1k.utils.device import capabilities
from resnet_in1k.utils.rng import Stream


class StochasticDepth:
    """What the images of one process's share of each global batch skip, drawn for (seed, step)."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, device: torch.device, rank: int, num_processes: int):
        blocks = [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]
        self._seed, self._global_batch_size, self._device = recipe.seed, recipe.global_batch_size, device
        self._keep = 1 - recipe.stochastic_depth * torch.arange(len(blocks)) / (len(blocks) - 1)
        share = recipe.global_batch_size // num_processes
        self._rows = slice(rank * share, (rank + 1) * share)
        self._factors: Tensor | None = None
        for number, block in enumerate(blocks):
            last_norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            last_norm.register_forward_hook(functools.partial(self._scale, number))

    def draw(self, step: int, num_images: int) -> Tensor:
        """(B, blocks) on the device: 0 where the image skips the branch, else 1 / the probability that it does not."""
        generator = rng.generator(self._seed, Stream.STOCHASTIC_DEPTH, step)
        kept = torch.rand(self._global_batch_size, len(self._keep), generator=generator) < self._keep
        factors = (kept / self._keep)[self._rows][:num_images]  # fewer than its share in the preflight only
        pin = capabilities(self._device.type).pinned_memory
        return (factors.pin_memory() if pin else factors).to(self._device, non_blocking=pin)

    def use(self, factors: Tensor) -> None:
        """For the next forward pass, of as many images."""
        self._factors = factors

    def _scale(self, number: int, norm: torch.nn.Module, _: object, branch: Tensor) -> Tensor | None:
        if not norm.training:
            return None
        return branch * self._factors[:, number].view(-1, 1, 1, 1).to(branch.dtype)
