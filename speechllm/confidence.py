"""How sure a language model is of the words that it heard."""

import re

import torch

from speechllm.data.packing import pad, require_attention
from speechllm.encoding import Speech
from speechllm.model import SpeechLLM
from speechllm.projector import model_inputs
from speechllm.prompt import IGNORED, transcription_example

WORD = re.compile(r"\S+")


@torch.no_grad()
def word_confidences(speech: Speech, text: str, speech_llm: SpeechLLM) -> list[tuple[str, float]]:
    """The words of a text, each with its probability after the speech and the words before it.

    It is the product of the probabilities of the word's tokens, by one pass over the whole; the text tokenizer must
    know where its tokens stand (a fast one of transformers).
    """
    model, text_tokenizer = speech_llm.model, speech_llm.text_tokenizer
    example = transcription_example(speech, text, speech_llm.vocabulary, text_tokenizer)
    require_attention(model, speech_llm.vocabulary)
    batch, labels = pad([example], model.device, speech_llm.vocabulary), example.labels.to(model.device)
    inputs = model_inputs(model, speech_llm.vocabulary, batch.input_ids, batch.features)
    learnt = labels[1:] != IGNORED
    log_probabilities = model(**inputs, **batch.arguments).logits[0, :-1][learnt].float().log_softmax(-1)
    chosen = log_probabilities.gather(1, labels[1:][learnt, None])[:-1, 0].tolist()  # without the end token
    offsets = text_tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    spans = offsets["offset_mapping"]
    return [
        (word[0], float(torch.tensor(_within(chosen, spans, *word.span())).sum().exp())) for word in WORD.finditer(text)
    ]


def _within(values: list[float], spans: list[tuple[int, int]], start: int, end: int) -> list[float]:
    """The values of the tokens that reach into a span of characters."""
    return [value for value, (first, last) in zip(values, spans, strict=True) if first < end and last > start]
