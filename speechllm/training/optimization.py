"""AdamW for a language model with new rows: how fast they learn, and what learns before the rest."""

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
    """AdamW over what is trained of a language model, with or without an adapter.

    Embeddings, norms and biases are not decayed: a code that is rare would shrink to nothing. row_learning_rate: of
    the new rows and of a projector, which is as new; 0: they stay as they are. Where the rows are a part of a whole
    matrix that is trained, what AdamW did to them is stretched after each step: its steps are proportional to the rate,
    so this is what a rate of their own would have done.
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
    )
    if matrices and row_rate != learning_rate:
        _stretch_steps(optimizer, matrices, _rows(vocabulary), row_rate / learning_rate)
    return optimizer


def keep_row_gradients(model: PreTrainedModel | PeftModel, vocabulary: AudioVocabulary) -> None:
    """Drop the gradients of all but the new rows and a projector.

    AdamW leaves the rest as it is, if it never had any.
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
    """The embedding matrix and, where it is another one, the head's, unless an adapter has frozen them."""
    weights = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    if weights[1] is weights[0]:
        del weights[1]
    # an adapter gives out a merged copy of a matrix, which is no parameter
    return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]


def _rows(vocabulary: AudioVocabulary) -> slice:
    ids = vocabulary.new_ids
    return slice(int(ids.min()), int(ids.max()) + 1)  # one stretch, see extend_vocabulary


def _stretch_steps(optimizer: AdamW, matrices: list[Tensor], rows: slice, factor: float) -> None:
    """Let the rows of undecayed matrices go `factor` times as far in every step."""
    before: list[Tensor] = []

    def remember(*_: object) -> None:
        before[:] = [matrix.detach()[rows].clone() for matrix in matrices]

    @torch.no_grad()
    def stretch(*_: object) -> None:
        for matrix, old in zip(matrices, before, strict=True):
            matrix[rows] = old.lerp(matrix[rows], factor)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(stretch)
