"""How well a language model still knows its language: the perplexity of plain text."""

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from speechllm.data.packing import pad
from speechllm.decoding import answer_batches
from speechllm.model import SpeechLLM
from speechllm.projector import model_inputs
from speechllm.prompt import Example
from speechllm.vocabulary import opening_token_ids, text_token_ids
from tokenizer.corpus import spread
from tokenizer.errors import InputError
from tokenizer.tables import require_utf8

MOST = 1000  # lines of a file that are read, evenly chosen
TOKENS = 1024  # predicted at once, at most, or a single text


@dataclass(frozen=True)
class Perplexity:
    """perplexity: per token; that per word is perplexity ** (tokens / words). words: separated by spaces."""

    perplexity: float
    tokens: int
    words: int


def read_texts(file: str | Path) -> list[str]:
    """At most MOST lines of a text file, .gz or not, evenly chosen, without empty ones.

    Raises TableError for a file that is not UTF-8, InputError for one without text.
    """
    require_utf8(file)
    with (
        gzip.open(file, "rt", encoding="utf-8") if str(file).endswith(".gz") else open(file, encoding="utf-8") as lines
    ):
        texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{file} holds no text, expected one sentence or more, each in a line")
    return spread(texts, MOST)


@torch.no_grad()
def text_perplexity(texts: Sequence[str], speech_llm: SpeechLLM) -> Perplexity:
    """exp of the mean negative log likelihood of the tokens of texts, each by itself and as it is written.

    A text stands after the tokens with which the text tokenizer begins one; where there are none (Qwen2), its first
    token is not predicted and not counted; no end token is. The choice is among text tokens, as in answers, so that a
    new vocabulary for speech changes nothing.
    """
    model, vocabulary, text_tokenizer = speech_llm.model, speech_llm.vocabulary, speech_llm.text_tokenizer
    opening = opening_token_ids(text_tokenizer, "")
    examples = []
    for ids in text_token_ids(text_tokenizer, texts):
        tokens = torch.tensor(opening + ids)
        labels = tokens.clone()
        labels[: len(opening)] = -100
        examples.append(Example(tokens, labels))
    examples = [one for one in examples if len(one) > 1]
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for chosen in answer_batches([len(one) for one in examples], [0] * len(examples), TOKENS):
        batch = pad([examples[i] for i in chosen], model.device)
        inputs = model_inputs(model, vocabulary, batch.input_ids, None)
        logits = model(**inputs, **batch.arguments, use_cache=False).logits.flatten(0, 1)
        kept = batch.targets >= 0
        total += float(F.cross_entropy(logits[kept, : vocabulary.offset].float(), batch.targets[kept], reduction="sum"))
        count += int(kept.sum())
    model.train(training)
    words = sum(len(text.split()) for text in texts)
    return Perplexity(math.exp(total / max(1, count)), count, words)
