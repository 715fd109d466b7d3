"""The state of a training as plain tensors on CPU, also where each process holds a part of every weight (FSDP)."""

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


@dataclass
class Best:
    """The best validation so far, by word error rate."""

    wer: float = math.inf
    step: int = 0
    weights: dict[str, Tensor] | None = None
    worse: int = 0  # validations since then


class TrainingState:
    """All that changes in a training: the weights, the optimizer's moments, the weights' average, the best so far.

    evaluated: what the main process validates and exports, within `evaluation_weights`: the model itself or, under
    FSDP, a whole copy of it. decay: per step, of an exponential moving average of the trained weights, which is then
    evaluated in their place. Make this before `accelerator.prepare`.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, decay: float | None = None):
        self.main = accelerator.is_main_process
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.model = model
        self.optimizer = optimizer
        self.decay = decay if self.main else None
        self.average: dict[str, Tensor] = {}  # from the first step on
        self.best = Best()
        whole = self.main and self.sharded
        self.evaluated = copy.deepcopy(model).to(accelerator.device) if whole else model

    def follow(self) -> None:
        """After each step: let the average follow the weights."""
        if self.decay is None:
            return
        weights = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if self.average:
            torch._foreach_lerp_([self.average[name] for name in weights], [*weights.values()], 1 - self.decay)
        else:
            self.average = {name: weight.clone() for name, weight in weights.items()}

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """In every process: within it, `evaluated` has the weights to be evaluated, in the main process."""
        if self.sharded:
            weights = trained_weights(self.model, self.main)
            if self.main:
                load_weights(self.evaluated, weights)
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        """Let the model and the average change places; no weight is copied."""
        parameters = dict(self.model.named_parameters())
        for name, average in self.average.items():
            self.average[name], parameters[name].data = parameters[name].data, average

    def record_validation(self, step: int, wer: float, keep: bool) -> None:
        """Main process, within `evaluation_weights`: a validation's result; with `keep` the best weights are kept."""
        if wer < self.best.wer:
            self.best = Best(wer, step, trained_weights(self.evaluated) if keep else None)
        else:
            self.best.worse += 1

    def load_best(self) -> None:
        """Main process, within `evaluation_weights`: load the kept weights, if any, into `evaluated`."""
        if self.best.weights is not None:
            load_weights(self.evaluated, self.best.weights)

    def state_dict(self) -> dict[str, Any]:
        """For `torch.save` in the main process; the others have to ask, too."""
        return {
            "model": trained_weights(self.model, self.main),
            "optimizer": _whole(self.optimizer.state_dict(), self.main),
            "average": _whole(self.average, self.main),
            "best": vars(self.best),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave after training, in every process."""
        load_weights(self.model, state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.best = Best(**state["best"])
        if self.main:
            parameters = dict(self.model.named_parameters())
            self.average = {name: value.to(parameters[name], copy=True) for name, value in state["average"].items()}


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, clip: float) -> tuple[Any, Any]:
    """`Accelerator.prepare` for a training whose loop counts its own batches, also with DeepSpeed.

    clip: largest norm of the gradients, which DeepSpeed sees to itself.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.prepare(model, optimizer)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = 1  # asked for, but there is no loader it would be about
    settings["gradient_clipping"] = clip
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    prepared = accelerator.prepare(model, optimizer)
    for name, buffer in model.named_buffers():  # rotary frequencies among them, which it rounds like weights
        buffer.data = exact[name].to(buffer.device)
    return prepared


def trained_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Copies of all weights that are trained. Every process has to ask; one that does not `keep` them gets none."""
    return _whole({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, keep)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put back what `trained_weights` gave."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(_like(parameters[name], value))


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`, for parameters of which a process holds a part as well."""
    optimizer.load_state_dict(state)
    for parameter, held in optimizer.state.items():
        held.update({name: _like(parameter, value) for name, value in held.items()})


def _whole(tree: Any, keep: bool) -> Any:
    """The same with whole tensors on CPU; without tensors where they are not kept."""

    def whole(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.full_tensor() if isinstance(x, DTensor) else x  # the processes exchange their parts
        return x.to("cpu", copy=True) if keep else None

    return tree_map(whole, tree)


def _like(parameter: Tensor, value: Any) -> Any:
    """A whole value as the parameter is held: cut where that is cut."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
