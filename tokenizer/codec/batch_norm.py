"""Batch normalisation over what all processes of a training see together."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class BatchNorm1d(nn.BatchNorm1d):
    """torch's; where several processes train, with the statistics of all their parts of the batch, of equal shapes.

    Each process's few crops alone have other statistics than those that are exported, and so other codes. torch's own
    `SyncBatchNorm` is for GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """float [B, C, T] -> the same shape. While training, all processes call it together."""
        if not (self.training and torch.is_grad_enabled() and dist.is_initialized()):  # one process begins for all
            return super().forward(x)
        processes, wide = dist.get_world_size(), x.float()
        mean = all_reduce(wide.mean((0, 2))) / processes
        centred = wide - mean[:, None]
        variance = all_reduce(centred.square().mean((0, 2))) / processes
        count = processes * x.shape[0] * x.shape[2]
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        normalised = centred * (variance + self.eps).rsqrt()[:, None]
        if self.affine:
            normalised = normalised * self.weight[:, None] + self.bias[:, None]
        return normalised.to(x.dtype)
