"""Limits of the gradients that auxiliary losses send to the latents, in an ordinary backward pass."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class GradientCaps(nn.Module):
    """Keeps the gradients of auxiliary losses at the latents below a ratio to that of the reconstruction.

    `reference` and `limit` are the identity. In the backward pass they measure the norm of the gradient, and `limit`
    multiplies it by a factor of at most 1. The factors follow from moving averages of the norms of earlier steps; they
    are 0 in the first step, in which nothing is known.

    What was measured comes out as the gradient of the parameter `squares`, which is averaged over processes like all
    gradients and never trained: leave it out of the optimizer.
    """

    ratios: Tensor
    factors: Tensor
    average: Tensor
    updates: Tensor

    def __init__(self, ratios: Mapping[str, float | None], decay: float = 0.9):
        """ratios: by name of the loss; None for no limit."""
        super().__init__()
        self.names, self.decay = list(ratios), decay
        limits = [math.inf if ratio is None else ratio for ratio in ratios.values()]
        self.register_buffer("ratios", torch.tensor(limits), persistent=False)
        self.register_buffer("factors", torch.isinf(self.ratios).float())
        self.register_buffer("average", torch.zeros(1 + len(limits)))  # of the squared norms, the reference first
        self.register_buffer("updates", torch.zeros(()))
        self.squares = nn.Parameter(torch.zeros(1 + len(limits)))

    def reference(self, x: Tensor) -> Tensor:
        """x float [B, D, T], from which the reconstruction is decoded."""
        return _Measured.apply(x, self.squares, self.factors.new_ones(()), 0)

    def limit(self, name: str, x: Tensor) -> Tensor:
        """x float [B, D, T], from which the loss of that name is computed."""
        index = self.names.index(name)
        return _Measured.apply(x, self.squares, self.factors[index].clone(), 1 + index)

    @torch.no_grad()
    def update(self) -> dict[str, Tensor]:
        """Take over what a backward pass measured; call it after each, in all processes.

        Returns, for every loss, `<name>_gradient`, the ratio that its gradient had, and `<name>_factor`, what it was
        multiplied by.
        """
        if not self.names or self.squares.grad is None:
            return {}
        measured, self.squares.grad = self.squares.grad, None
        norms = measured.sqrt()
        applied = self.factors * norms[1:] / norms[0].clamp(min=1e-12)
        found = {f"{name}_gradient": ratio for name, ratio in zip(self.names, applied, strict=True)}
        found |= {f"{name}_factor": factor for name, factor in zip(self.names, self.factors.clone(), strict=True)}
        self.updates += 1
        self.average.lerp_(measured, 1 - self.decay)
        norms = (self.average / (1 - self.decay**self.updates)).sqrt()
        self.factors.copy_((self.ratios * norms[0] / norms[1:].clamp(min=1e-12)).clamp(max=1))
        return found


class _Measured(torch.autograd.Function):
    """The identity of x; multiplies its gradient by `factor` and gives its squared norm to squares[index]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, squares: Tensor, factor: Tensor, index: int) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.size, ctx.index = len(squares), index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        square = gradient.float().square().sum()
        measured = torch.zeros(ctx.size, device=gradient.device)
        measured[ctx.index] = square
        return factor * gradient, measured, None, None
