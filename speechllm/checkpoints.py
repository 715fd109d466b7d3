"""The state of a training as plain tensors on CPU, also where each process holds a part of every weight (FSDP)."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
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

    judged: what the main process validates and exports; the model itself, or the exponential moving average of its
    weights (`decay` a step), or under FSDP a whole copy. Make this before `accelerator.prepare`.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, decay: float | None = None):
        self.main = accelerator.is_main_process
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.model = model
        self.optimizer = optimizer
        self.judged = model
        self.average: AveragedModel | None = None
        self.best = Best()
        if self.main and self.sharded:
            self.judged = copy.deepcopy(model).to(accelerator.device)
        elif self.main and decay is not None:
            self.average = AveragedModel(model, accelerator.device, multi_avg_fn=get_ema_multi_avg_fn(decay))
            self.judged = self.average.module

    def follow(self) -> None:
        """After each step: let the average follow the weights."""
        if self.average is not None:
            self.average.update_parameters(self.model)

    def gather(self) -> None:
        """Before `judged` is used, in every process: bring the parts of the weights together."""
        if self.sharded:
            weights = trained_weights(self.model, self.main)
            if self.main:
                load_weights(self.judged, weights)

    def offer(self, step: int, wer: float, keep: bool) -> None:
        """Main process: a validation's result; with `keep` the judged weights are kept while they are the best."""
        if wer < self.best.wer:
            self.best = Best(wer, step, trained_weights(self.judged) if keep else None)
        else:
            self.best.worse += 1

    def take_best(self) -> None:
        """Main process: let `judged` have the weights that were kept, if there are any."""
        if self.best.weights is not None:
            load_weights(self.judged, self.best.weights)

    def state_dict(self) -> dict[str, Any]:
        """For `torch.save` in the main process; the others have to ask, too."""
        return {
            "model": trained_weights(self.model, self.main),
            "optimizer": _whole(self.optimizer.state_dict(), self.main),
            "average": None if self.average is None else trained_weights(self.judged),
            "best": vars(self.best),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave after training, in every process."""
        load_weights(self.model, state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.best = Best(**state["best"])
        if self.average is not None:
            load_weights(self.judged, state["average"])
            self.average.n_averaged += 1  # the next weights are averaged, not taken over


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
