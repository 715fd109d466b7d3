"""Rates of their own for new rows, against AdamW given these rows as a parameter of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from speechllm import SpeechLLM, prepare_adapter
from speechllm.training.optimization import keep_row_gradients, make_optimizer

MakeSpeechLLM = Callable[..., SpeechLLM]
STEPS = 5


def set_gradients(model: nn.Module, step: int) -> None:
    """Some gradient for every trained weight, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_matrix(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_matrix_are_updated_as_with_their_own_learning_rate(
    make_speech_llm: MakeSpeechLLM, tied: bool
) -> None:
    speech_llm = make_speech_llm(tied=tied, spare=60)
    model, first, last = speech_llm.model, speech_llm.vocabulary.offset, speech_llm.vocabulary.end_id + 1
    reference = {name: nn.Parameter(value) for name, value in weights(model).items()}
    rows = {name: nn.Parameter(p.detach()[first:last].clone()) for name, p in reference.items() if is_matrix(name)}
    assert len(rows) == (1 if tied else 2)
    decayed = [p for name, p in reference.items() if not is_matrix(name) and p.ndim == 2]
    spared = [p for name, p in reference.items() if is_matrix(name) or p.ndim == 1]
    groups = [
        {"params": decayed, "lr": 1e-3, "weight_decay": 0.1},
        {"params": spared, "lr": 1e-3, "weight_decay": 0.0},
        {"params": list(rows.values()), "lr": 7e-3, "weight_decay": 0.0},
    ]
    expected = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    optimizer = make_optimizer(model, speech_llm.vocabulary, 1e-3, weight_decay=0.1, row_learning_rate=7e-3)
    for step in range(STEPS):
        for parameters in (optimizer.param_groups, expected.param_groups):  # a schedule
            for group, rate in zip(parameters, (1e-3, 1e-3, 7e-3), strict=False):
                group["lr"] = rate * (1 - step / STEPS)
        set_gradients(model, step)
        for name, parameter in model.named_parameters():
            reference[name].grad = parameter.grad.clone()
            if name in rows:
                rows[name].grad = parameter.grad[first:last].clone()
        optimizer.step()
        expected.step()
    for name, found in weights(model).items():
        whole = reference[name].detach().clone()
        if name in rows:
            whole[first:last] = rows[name].detach()
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6, msg=name)


def test_embeddings_norms_and_biases_are_not_decayed(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm(tied=False)
    model, before = speech_llm.model, weights(speech_llm.model)
    optimizer = make_optimizer(model, speech_llm.vocabulary, 1e-2, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, found in weights(model).items():
        factor = 1 if is_matrix(name) or found.ndim == 1 else 1 - 1e-2 * 0.5
        torch.testing.assert_close(found, before[name] * factor, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_training_the_new_rows_first_equals_starting_the_rest_later(make_speech_llm: MakeSpeechLLM, tied: bool) -> None:
    speech_llm = make_speech_llm(tied=tied)
    model, vocabulary = speech_llm.model, speech_llm.vocabulary
    before = weights(model)
    optimizer = make_optimizer(model, vocabulary, 1e-3, weight_decay=0.1, row_learning_rate=5e-3)
    for step in range(STEPS):
        set_gradients(model, step)
        keep_row_gradients(model, vocabulary)
        optimizer.step()
    new = torch.zeros(vocabulary.size, dtype=torch.bool)
    new[vocabulary.new_ids] = True
    for name, found in weights(model).items():
        if is_matrix(name):
            assert torch.equal(found[~new], before[name][~new])
            assert (found[new] != before[name][new]).all()
        else:
            assert torch.equal(found, before[name]), name
    set_gradients(model, STEPS)
    optimizer.step()
    assert all((found != before[name]).any() for name, found in weights(model).items())


@pytest.mark.parametrize("tied", [True, False])
def test_rows_with_a_learning_rate_of_0_are_frozen(make_speech_llm: MakeSpeechLLM, tied: bool) -> None:
    speech_llm = make_speech_llm(tied=tied)
    model, new = speech_llm.model, speech_llm.vocabulary.new_ids
    before = weights(model)
    optimizer = make_optimizer(model, speech_llm.vocabulary, 1e-3, row_learning_rate=0)
    set_gradients(model, 0)
    optimizer.step()
    for name, found in weights(model).items():
        assert (found != before[name]).any(), name
        assert not is_matrix(name) or torch.equal(found[new], before[name][new])


@pytest.mark.parametrize("form", ["lora", "rows"])
def test_the_rows_of_an_adapter_have_their_own_learning_rate(
    make_speech_llm: MakeSpeechLLM, tmp_path: Path, form: str
) -> None:
    speech_llm = make_speech_llm()
    speech_llm.model.save_pretrained(tmp_path)
    speech_llm.model.name_or_path = str(tmp_path)
    model = prepare_adapter(speech_llm.model, speech_llm.vocabulary, form, rank=2)
    optimizer = make_optimizer(model, speech_llm.vocabulary, 1e-3, weight_decay=0.1, row_learning_rate=5e-3)
    before = weights(model)
    set_gradients(model, 0)
    optimizer.step()
    moved = {name: (found - before[name]).abs() for name, found in weights(model).items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, way in moved.items() if way.any()} == trained
    rows = {name for name in trained if "trainable_tokens" in name}
    assert len(rows) == 1 and (form == "lora") == bool(trained - rows)
    for name in trained:  # Adam's first step is as long as the rate, whatever the gradient, and decay comes on top
        decay = 0 if name in rows else 1e-3 * 0.1 * before[name].abs().max().item()
        torch.testing.assert_close(moved[name].max().item(), 5e-3 if name in rows else 1e-3, rtol=0.01, atol=decay)
    set_gradients(model, 1)
    keep_row_gradients(model, speech_llm.vocabulary)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == rows
