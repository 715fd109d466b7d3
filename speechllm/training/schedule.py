"""Learning rate and random seed of a training step."""

import math

import torch


def seed_step(seed: int, step: int, process: int = 0) -> None:
    """Seed torch for one training step.

    Since every step is seeded by its number, a resumed run draws the same numbers as an uninterrupted one.
    """
    number = (seed * 1_000_003 + step) * 1_009 + process
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # where torch would note the place in the code as well, for an accelerator to come: it takes a millisecond
        torch.default_generator.manual_seed(number)


def warmup_cosine(step: int, steps: int, warmup: int, joined: int = 0) -> float:
    """Factor of the learning rate at a step: linear up over `warmup` steps, if any, then half a cosine down to zero.

    joined: step at which more weights start to be trained; the warm-up is repeated from there, because AdamW's first
    steps, without gradient statistics, are the largest it can make.
    """
    rise = min(1.0, (step + 1 - (joined if step >= joined else 0)) / max(1, warmup))
    return rise * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its `base_lr` (its initial learning rate)."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
