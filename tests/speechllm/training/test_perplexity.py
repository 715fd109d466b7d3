"""The perplexity of texts, against the model asked for one text at a time."""

import math
from collections.abc import Callable

import pytest
import torch

from speechllm import SpeechLLM
from speechllm.training.perplexity import text_perplexity

TEXTS = ["TURN ON THE RED LAMP", "THE", "ON RED THE LAMP TURN ON", "LAMP ON"]


@pytest.mark.numeric
@torch.no_grad()
def test_texts_together_have_the_perplexity_of_each_alone(make_speech_llm: Callable[..., SpeechLLM]) -> None:
    speech_llm = make_speech_llm()
    model, vocabulary = speech_llm.model, speech_llm.vocabulary
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor(speech_llm.text_tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) > 1:
            chances = model(ids[None]).logits[0, :-1, : vocabulary.offset].log_softmax(-1)
            total -= float(chances.gather(1, ids[1:, None]).sum())
            count += len(ids) - 1
    found = text_perplexity(TEXTS, speech_llm)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (found.tokens, found.words) == (count, sum(len(text.split()) for text in TEXTS))


def test_one_long_text_does_not_make_the_others_wait_for_each_other(make_speech_llm: Callable[..., SpeechLLM]) -> None:
    speech_llm, passes = make_speech_llm(), []
    speech_llm.model.register_forward_hook(lambda *_: passes.append(1))
    text_perplexity([*TEXTS * 5, " ".join(TEXTS * 10)], speech_llm)
    assert len(passes) <= 2
