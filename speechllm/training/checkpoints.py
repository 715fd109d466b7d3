"""The state of a training as plain tensors on the CPU, also if weights are sharded over processes (FSDP)."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from tokenizer.training.averaging import decay_at


@dataclass
class Best:
    """The best validation so far."""

    error_rate: float = math.inf  # of words, or of characters where these are what counts
    step: int = 0
    weights: dict[str, Tensor] | None = None
    validations_without_improvement: int = 0


class TrainingState:
    """The state of a training: weights, optimizer moments, average of the weights, best checkpoint.

    evaluated: the model that is validated and exported, within `evaluation_weights`: the trained model, in the first
    `evaluators` processes, or with FSDP an unsharded copy, in the main process. decay: per step, at most (`decay_at`),
    of a moving average of the trained weights, which is evaluated in their place. Create this before
    `accelerator.prepare`.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, decay: float | None = None):
        self.main = accelerator.is_main_process
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.model = model
        self.optimizer = optimizer
        self.evaluators = 1 if self.sharded else accelerator.num_processes
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # starts at the first step
        self.updates = 0  # of the average
        self.best = Best()
        self.device = accelerator.device
        self.evaluated = copy.deepcopy(model).cpu() if self.main and self.sharded else model

    def follow(self) -> None:
        """Update the average; to be called after each step."""
        if self.decay is None:
            return
        weights = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if self.average:
            share = 1 - decay_at(self.decay, self.updates)
            torch._foreach_lerp_([self.average[name] for name in weights], [*weights.values()], share)
        else:
            self.average = {name: weight.clone() for name, weight in weights.items()}
        self.updates += 1

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """While active, `evaluated` has the weights to evaluate. Every process must enter it."""
        if self.sharded:
            weights = trained_weights(self.model, self.main)
            if self.main:
                load_weights(self.evaluated.to(self.device), weights)
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()
            if self.main and self.sharded:  # the GPU's memory is the training's
                self.evaluated.cpu()

    def _swap_average(self) -> None:
        """Exchange the model's weights and the average, without copying."""
        parameters = dict(self.model.named_parameters())
        for name, average in self.average.items():
            self.average[name], parameters[name].data = parameters[name].data, average

    def record_validation(self, step: int, error_rate: float, keep: bool) -> None:
        """Record an error rate, and with `keep` the weights of the best. Main process, within `evaluation_weights`."""
        if error_rate < self.best.error_rate:
            self.best = Best(error_rate, step, trained_weights(self.evaluated) if keep else None)
        else:
            self.best.validations_without_improvement += 1

    def load_best(self) -> None:
        """Load the best weights, if kept, into `evaluated`. Main process, within `evaluation_weights`."""
        if self.best.weights is not None:
            load_weights(self.evaluated, self.best.weights)

    def state_dict(self) -> dict[str, Any]:
        """Copies, for `torch.save` in the main process. Every process must call it."""
        return {
            "model": trained_weights(self.model, self.main),
            "optimizer": _unsharded(self.optimizer.state_dict(), self.main),
            "average": _unsharded(self.average, self.main),
            "updates": self.updates,
            "best": dict(vars(self.best)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Every process must call it."""
        load_weights(self.model, state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.best, self.updates = Best(**state["best"]), state["updates"]
        parameters = dict(self.model.named_parameters())
        self.average = {name: value.to(parameters[name], copy=True) for name, value in state["average"].items()}


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, clip: float) -> tuple[Any, Any]:
    """`Accelerator.prepare` for a training loop with its own batches, also with DeepSpeed.

    clip: maximum gradient norm, for DeepSpeed, which clips gradients itself.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.prepare(model, optimizer)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = 1  # required, although there is no data loader
    settings["gradient_clipping"] = clip
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    prepared = accelerator.prepare(model, optimizer)
    for name, buffer in model.named_buffers():  # DeepSpeed rounds them like weights, also the rotary frequencies
        buffer.data = exact[name].to(buffer.device)
    return prepared


def trained_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Copies of all trained weights; None instead of tensors without `keep`. Every process must call it."""
    return _unsharded({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, keep)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load what `trained_weights` returned."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(_sharded_like(parameters[name], value))


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`Optimizer.load_state_dict` that also supports sharded parameters."""
    optimizer.load_state_dict(state)
    for parameter, held in optimizer.state.items():
        held.update({name: _sharded_like(parameter, value) for name, value in held.items()})


def _unsharded(tree: Any, keep: bool) -> Any:
    """The tree with full tensors on the CPU; without `keep`, with None in their place."""

    def unsharded(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.full_tensor() if isinstance(x, DTensor) else x  # collective: the processes exchange their shards
        return x.to("cpu", copy=True) if keep else None

    return tree_map(unsharded, tree)


def _sharded_like(parameter: Tensor, value: Any) -> Any:
    """A full value, sharded if the parameter is."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
