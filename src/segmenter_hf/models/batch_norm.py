"""Batch normalization over all processes of a training."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class VitEncoderAllReduce(torch.autograd.Function):
    """Sum over all processes; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return VitEncoderAllReduce.apply(gradient)


class VitEncoderBatchNorm(nn.BatchNorm2d):
    """Batch normalization whose statistics in training are those of the batches of all processes together.

    torch's `SyncBatchNorm` does the same on GPUs alone, and only after a conversion of the model.
    """

    # Not optional as in the base class: it always has a momentum and keeps statistics.
    momentum: float
    num_batches_tracked: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to the same shape."""
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (self.training and distributed):
            return super().forward(features)
        values = features.float()
        count = values.new_tensor(values.numel() / values.shape[1])
        sums = VitEncoderAllReduce.apply(torch.cat([values.sum((0, 2, 3)), count[None]]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = values - mean[:, None, None]
        variance = VitEncoderAllReduce.apply(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(features.dtype)


__all__ = ["VitEncoderBatchNorm"]
