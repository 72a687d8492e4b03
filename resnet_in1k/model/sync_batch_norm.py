"""Norm statistics over all processes: torch's SyncBatchNorm, which is for accelerators only, and the same for a CPU."""

import torch
import torch.distributed as dist
from torch import Tensor


def synchronize_norms(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model with its batch norms replaced, keys and tensors as they were. To be called with a process group."""
    if device.type != "cpu":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is torch.nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm
    return model


class CpuSyncBatchNorm(torch.nn.BatchNorm2d):
    """BatchNorm2d that normalizes a training batch by the mean and variance over all processes' images, of which each
    has equally many."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        world_size = dist.get_world_size()
        values = images.to(torch.promote_types(images.dtype, torch.float32))
        mean = _SumOverProcesses.apply(values.mean(dim=(0, 2, 3))) / world_size
        centerd = values - mean.view(-1, 1, 1)
        variance = _SumOverProcesses.apply(centerd.square().mean(dim=(0, 2, 3))) / world_size
        normalized = centerd * (variance + self.eps).rsqrt().view(-1, 1, 1)
        result = normalized * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        count = world_size * images.numel() / images.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return result.to(images.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """A sum that each process uses; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
