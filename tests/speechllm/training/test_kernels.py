"""Faster kernels compute the same, or say what they lack."""

from collections.abc import Callable

import pytest
import torch

from speechllm import LabelledLoss, SpeechLLM, prepare_adapter, transcription_example
from speechllm.training.kernels import compile_layers, require_liger
from tokenizer.errors import InputError


def test_compiled_layers_lose_what_the_plain_ones_lose(make_speech_llm: Callable[..., SpeechLLM]) -> None:
    speech_llm = make_speech_llm()
    model, parts = speech_llm.model, (speech_llm.vocabulary, speech_llm.text_tokenizer)
    model.name_or_path = "base"
    model = prepare_adapter(model, speech_llm.vocabulary, rank=2, alpha=4)
    codes = torch.randint(16, (1, 40), generator=torch.Generator().manual_seed(0))
    batches = [
        [transcription_example(codes[:, :n], "RED LAMP", *parts) for n in lengths] for lengths in ((40, 7), (3,))
    ]
    loss_of, names = LabelledLoss(model, speech_llm.vocabulary), list(model.state_dict())

    def learn() -> list[torch.Tensor]:
        model.zero_grad()
        losses = [loss_of(batch)[0] for batch in batches]
        sum(losses).backward()
        return [*losses, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = [x.detach().clone() for x in learn()]
    compiled = []
    compile_layers(model, backend=lambda graph, inputs: compiled.append(graph) or graph)
    for found, wanted in zip(learn(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert compiled and list(model.state_dict()) == names


def test_without_an_adapter_the_layers_and_nothing_else_are_compiled(
    make_qwen2: Callable, text_tokenizer: object
) -> None:
    compile_layers(model := make_qwen2(text_tokenizer))
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert compiled == list(model.model.layers) and len(compiled) == 2


@pytest.mark.parametrize("gpu, lacking", [(False, "no such GPU"), (True, "no such package")])
def test_what_liger_lacks_is_said(monkeypatch: pytest.MonkeyPatch, gpu: bool, lacking: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("speechllm.training.kernels.is_liger_kernel_available", lambda: False)
    with pytest.raises(InputError, match=rf"pip install 'speechllm\[liger\]'.*{lacking}: set liger=false"):
        require_liger()
