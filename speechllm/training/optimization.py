"""AdamW for a language model with new rows, which may have their own learning rate or be trained first."""

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from speechllm.adapters import ROWS
from speechllm.projector import NAME as PROJECTOR
from speechllm.vocabulary import AudioVocabulary


def make_optimizer(
    model: PreTrainedModel | PeftModel,
    vocabulary: AudioVocabulary,
    learning_rate: float,
    weight_decay: float = 0.01,
    row_learning_rate: float | None = None,
) -> AdamW:
    """AdamW over the trained parameters of a language model, with or without an adapter.

    Embeddings, norms and biases are not decayed: rows of rare codes would shrink to zero. row_learning_rate: of the
    new rows and of a projector, which is new, too; 0: frozen. If the rows are part of a larger trained matrix, their
    update is scaled after each step: AdamW's steps are proportional to the learning rate, so this is equivalent to a
    learning rate of their own.
    """
    row_rate = learning_rate if row_learning_rate is None else row_learning_rate
    matrices = trained_matrices(model)
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "not decayed": [], "rows": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or any(parameter is matrix for matrix in matrices)
            new = ROWS in name or PROJECTOR in name
            groups["rows" if new else "not decayed" if spared else "decayed"].append(parameter)
    rates = {"decayed": (learning_rate, weight_decay), "not decayed": (learning_rate, 0.0), "rows": (row_rate, 0.0)}
    optimizer = AdamW(
        [
            {"params": group, "lr": rates[kind][0], "weight_decay": rates[kind][1]}
            for kind, group in groups.items()
            if group
        ],
        betas=(0.9, 0.95),
        fused=True,  # one pass over the weights
    )
    if matrices and row_rate != learning_rate:
        _scale_row_updates(optimizer, matrices, _rows(vocabulary), row_rate / learning_rate)
    return optimizer


def keep_row_gradients(model: PreTrainedModel | PeftModel, vocabulary: AudioVocabulary) -> None:
    """Drop all gradients except those of the new rows and of a projector.

    AdamW does not change parameters that never had a gradient.
    """
    matrices, rows = trained_matrices(model), _rows(vocabulary)
    for name, parameter in model.named_parameters():
        if any(parameter is matrix for matrix in matrices):
            assert parameter.grad is not None
            parameter.grad[: rows.start] = 0
            parameter.grad[rows.stop :] = 0
        elif ROWS not in name and PROJECTOR not in name:
            parameter.grad = None


def trained_matrices(model: PreTrainedModel | PeftModel) -> list[Tensor]:
    """The embedding matrix and, if untied, the head's, unless an adapter has frozen them."""
    weights = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    if weights[1] is weights[0]:
        del weights[1]
    # with an adapter these are merged copies, which are not parameters
    return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]


def _rows(vocabulary: AudioVocabulary) -> slice:
    ids = vocabulary.new_ids
    return slice(int(ids.min()), int(ids.max()) + 1)  # contiguous, see extend_vocabulary


def _scale_row_updates(optimizer: AdamW, matrices: list[Tensor], rows: slice, factor: float) -> None:
    """Multiply the update of these rows of undecayed matrices by `factor` in every step."""
    before: list[Tensor] = []

    def remember(*_: object) -> None:
        before[:] = [matrix.detach()[rows].clone() for matrix in matrices]

    @torch.no_grad()
    def scale(*_: object) -> None:
        for matrix, old in zip(matrices, before, strict=True):
            matrix[rows] = old.lerp(matrix[rows], factor)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(scale)
