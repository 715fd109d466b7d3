"""Learning rates and random numbers of a training step."""

import math

import torch


def seed_step(seed: int, step: int, process: int = 0) -> None:
    """Seed torch for one training step.

    With every step seeded by its number, a resumed run draws exactly what the uninterrupted one would have drawn.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + process)


def warmup_cosine(step: int, steps: int, warmup: int, joined: int = 0) -> float:
    """Factor of the learning rate at a step: linear up over `warmup` steps, then half a cosine down to zero.

    joined: a step at which more weights begin to learn; it climbs once more from there, since AdamW's first steps,
    without a memory of gradients, are the largest it can make.
    """
    climb = min(1.0, (step + 1 - (joined if step >= joined else 0)) / warmup)
    return climb * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its own `base_lr` (the rate it was made with)."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
