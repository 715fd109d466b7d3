"""Encoded speech in, text out."""

import functools
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
)

from speechllm.data.packing import PADDING, require_attention
from speechllm.encoding import Speech
from speechllm.greedy import contiguous_states, greedy_answers, reads_packed
from speechllm.letters import Letters, Spellings
from speechllm.messages import ConversationWriter
from speechllm.model import SpeechLLM
from speechllm.projector import model_inputs
from speechllm.prompt import Example, collate_prompts, conversation_example, join_features, transcription
from speechllm.vocabulary import AudioVocabulary
from tokenizer.errors import InputError

TOKENS_AT_LEAST = 16  # of the bound of an answer
ROOM = 1.5  # of the bound beyond the longest transcripts
COMPRESSION = 2.4  # ratio of zlib: speech stays below it, loops do not (Radford et al. 2022, section 4.5)
REFUSAL = re.compile(r"\b(as an ai|ai language model|ai assistant)\b", re.IGNORECASE)
FALLBACK_BEAMS = 4
BATCH_TOKENS = 32_768  # of prompts and answers at a time: 1 GB of keys and values in a model of 1.5 B in bfloat16
CACHE_AT_LEAST = 256  # tokens of a static cache
FALLBACK_NGRAM = 5  # tokens; a shorter one would forbid repeating a word that has many tokens


@dataclass(frozen=True)
class Transcription:
    """A recognised text. runaway: why the first answer was rejected (`runaway_reason`), or None if it was accepted.

    repaired: the text is the fallback's answer.
    """

    text: str
    runaway: str | None = None
    repaired: bool = False


def recognize(
    speech: Sequence[Speech],
    speech_llm: SpeechLLM,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
    beams: int = 1,
    fallback: bool = False,
    durations_s: Sequence[float] | None = None,
    static_cache: bool = False,
    letters_weight: float = 0.0,
) -> list[Transcription]:
    """Transcriptions of encoded utterances (`speech_of`), in the order given.

    Greedy with one beam, otherwise beam search. Answers contain only text, at most `answer_bound` tokens of it, and do
    not depend on the batch. batch_tokens: prompts and answers decoded at a time, in tokens with the padding, each beam
    counted: bounds the memory, except that an utterance may be longer.
    fallback: decode runaway answers again, by beam search without repeated 5-grams, and replace them if that helps.
    durations_s: of the utterances; may be None if the number of frames tells it: not for texts, a compressor's vectors
    and codes with merged repeats.
    static_cache: greedy decoding keeps keys and values in tensors that do not grow, so that on a GPU transformers
    compiles its steps. Does nothing with beams or letters_weight. Raises InputError for a family without such a cache.
    letters_weight: above 0, answers consist of a compressor's letters only, and the log probability that these were
    heard counts as much beside the language model's (`speechllm.letters`). Raises InputError without a compressor: one
    whose vectors the model reads, or `SpeechLLM.letters`.
    """
    text_tokenizer, encoding = speech_llm.text_tokenizer, speech_llm.vocabulary.encoding
    if durations_s is None:
        axis = -1 if encoding.kind == "codes" else 0
        frames = [utterance.shape[axis] for utterance in speech if isinstance(utterance, Tensor)]
        if len(frames) < len(speech) or (frames and encoding.deduplicated):
            raise ValueError("how long this speech lasts is not known from what was encoded: pass durations_s")
        durations_s = [count / encoding.frame_rate for count in frames]
    writer = ConversationWriter(speech_llm.vocabulary, text_tokenizer)
    prompts = [conversation_example(transcription(utterance), writer, answering=True) for utterance in speech]
    bounds = [answer_bound(duration_s, speech_llm.vocabulary) for duration_s in durations_s]
    letters = heard_letters(speech, speech_llm, letters_weight) if letters_weight else None
    return answer(prompts, bounds, speech_llm, batch_tokens, progress, beams, fallback, static_cache, letters)


def heard_letters(speech: Sequence[Speech], speech_llm: SpeechLLM, weight: float) -> Letters:
    """What a compressor heard in each encoded utterance; raises InputError where there is none."""
    labels, compressor = tuple(speech_llm.vocabulary.encoding.labels), speech_llm.letters
    heard = [one for one in speech if isinstance(one, Tensor)]
    if compressor is not None:
        labels = compressor.labels
        heard = [compressor.recode(codes) for codes in heard]
    elif not labels:
        raise InputError(
            "letters_weight needs a language model that reads the vectors of a compressor, or a compressor over the "
            "codes that it reads: give one as letters, or set letters_weight to 0"
        )
    return Letters(heard, labels, _spellings(speech_llm.text_tokenizer, speech_llm.vocabulary, labels), weight)


@functools.lru_cache(maxsize=16)
def _spellings(
    text_tokenizer: PreTrainedTokenizerBase, vocabulary: AudioVocabulary, labels: tuple[str, ...]
) -> Spellings:
    """Those of a model's answers, which take seconds to find: of as many models as stand on a page."""
    return Spellings(text_tokenizer, labels, forbidden_ids(text_tokenizer, vocabulary))


def answer(
    prompts: Sequence[Example],
    bounds: Sequence[int],
    speech_llm: SpeechLLM,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
    beams: int = 1,
    fallback: bool = False,
    static_cache: bool = False,
    letters: Letters | None = None,
) -> list[Transcription]:
    """Answers to prompts, in the order given, of at most so many tokens each; the rest as in `recognize`."""
    found = _decode(prompts, bounds, speech_llm, batch_tokens, progress, beams, 0, static_cache, letters)
    runaways = [i for i, first in enumerate(found) if first.runaway] if fallback else []
    if not runaways:
        return found
    again = [prompts[i] for i in runaways], [bounds[i] for i in runaways]
    beams = max(beams, FALLBACK_BEAMS)
    letters = letters and letters.of(runaways)
    second = _decode(*again, speech_llm, batch_tokens, progress, beams, FALLBACK_NGRAM, letters=letters)
    for i, other in zip(runaways, second, strict=True):
        if other.runaway is None:
            found[i] = replace(found[i], text=other.text, repaired=True)
    return found


def runaway_reason(text: str, at_bound: bool) -> str | None:
    """Why an answer is rejected: "empty", "looped", "refused" or "bound" (the maximum length is reached); else None."""
    if not text:
        return "empty"
    numbers = {letter: number for number, letter in enumerate(dict.fromkeys(text))}
    data = bytes(numbers[letter] % 256 for letter in text)  # in UTF-8, Hindi and Thai shrink as if they were loops
    if len(data) > COMPRESSION * len(zlib.compress(data)):
        return "looped"
    if REFUSAL.search(text):
        return "refused"
    return "bound" if at_bound else None


def count_runaways(transcriptions: Sequence[Transcription]) -> dict[str, int]:
    """Number of utterances by `runaway_reason`, and how many of them the fallback repaired."""
    reasons = Counter(found.runaway for found in transcriptions)
    counts = {reason: reasons[reason] for reason in ("empty", "looped", "refused", "bound")}
    return {**counts, "repaired": sum(found.repaired for found in transcriptions)}


def answer_bound(duration_s: float, vocabulary: AudioVocabulary) -> int:
    """Maximum number of tokens in an answer, so that a runaway model stops."""
    return TOKENS_AT_LEAST + int(vocabulary.tokens_per_second * duration_s)


def with_room(vocabulary: AudioVocabulary, tokens: np.ndarray, durations_s: Sequence[float]) -> AudioVocabulary:
    """The vocabulary with answers long enough for transcripts like these, of so many tokens each.

    English has 6 tokens a second where people speak fast; Thai in a vocabulary of English has 25.
    """
    if not len(tokens):
        return vocabulary
    needed = np.quantile((ROOM * tokens - TOKENS_AT_LEAST) / np.maximum(durations_s, 1e-3), 0.99)
    return replace(vocabulary, tokens_per_second=max(vocabulary.tokens_per_second, float(needed)))


@functools.lru_cache(maxsize=16)  # it takes tenths of a second, and a server decodes short pieces all the time
def forbidden_ids(text_tokenizer: PreTrainedTokenizerBase, vocabulary: AudioVocabulary) -> Tensor:
    """bool [rows], not to be changed: the token ids that are neither text nor the end token."""
    forbidden = torch.ones(vocabulary.size, dtype=torch.bool)
    forbidden[list(text_tokenizer.get_vocab().values())] = False
    specials = [index for index, token in text_tokenizer.added_tokens_decoder.items() if token.special]
    forbidden[specials] = True
    forbidden[vocabulary.new_ids] = True
    forbidden[text_tokenizer.eos_token_id] = False
    return forbidden


@torch.no_grad()
def _decode(
    prompts: Sequence[Example],
    bounds: Sequence[int],
    speech_llm: SpeechLLM,
    batch_tokens: int,
    progress: bool,
    beams: int,
    ngram: int = 0,
    static_cache: bool = False,
    letters: Letters | None = None,
) -> list[Transcription]:
    """One pass, in batches of similar length. ngram: no sequence of that many tokens is repeated; 0: no such rule."""
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    model, text_tokenizer, vocabulary = speech_llm.model, speech_llm.text_tokenizer, speech_llm.vocabulary
    greedy = bool(prompts) and beams == 1 and not ngram and letters is None
    static = greedy and static_cache
    family = model.config.model_type
    if static and (not model._can_compile_fullgraph or "mamba" in family):  # Mamba has a cache of its own
        raise InputError(f"{family}: transformers has no static cache for it; set static_cache=false")
    was_training = model.training
    model.eval()
    forbidden, end_id = forbidden_ids(text_tokenizer, vocabulary).to(model.device), text_tokenizer.eos_token_id
    packed = greedy and not static and reads_packed(model)
    require_attention(model, vocabulary)
    cache, size = None, 0
    found = [Transcription("")] * len(prompts)
    batches = answer_batches([*map(len, prompts)], bounds, batch_tokens // beams, static)
    for batch in tqdm(batches, "decode again" if ngram else "transcribe", disable=not (progress and batches)):
        some, limits = [prompts[i] for i in batch], [bounds[i] for i in batch]
        if packed:
            answers = greedy_answers(some, limits, model, vocabulary, forbidden, end_id)
        elif static:
            needed = static_size(len(some[0]) + max(limits))
            if cache is None or needed != size:
                cache, size = StaticCache(model.config, max_cache_len=needed), needed
            cache.reset()
            # each shape is compiled: as many rows in all batches of a size, the missing ones of the last prompt
            missing = max(1, min(batch_tokens // size, power_of_two(len(prompts)))) - len(batch)
            filled = [*some, *some[-1:] * missing], [*limits, *limits[-1:] * missing]
            answers = _generate(*filled, speech_llm, forbidden, beams, ngram, cache)[: len(batch)]
        else:
            own = letters and letters.of(batch)
            answers = _generate(some, limits, speech_llm, forbidden, beams, ngram, letters=own)
        texts = text_tokenizer.batch_decode(answers, skip_special_tokens=True)
        for i, text, answer, bound in zip(batch, map(str.strip, texts), answers, limits, strict=True):
            found[i] = Transcription(text, runaway_reason(text, len(answer) >= bound))
    model.train(was_training)
    return found


def answer_batches(
    lengths: Sequence[int], bounds: Sequence[int], tokens: int, static_cache: bool = False
) -> list[list[int]]:
    """Numbers of the prompts of each batch, the longest first: as many as fit with their answers, but at least one.

    static_cache: as many as fit in one, which is larger (`static_size`).
    """
    size_of = static_size if static_cache else int
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        both = [*(batches[-1] if batches else []), i]
        if not batches or len(both) * size_of(lengths[both[0]] + max(bounds[k] for k in both)) > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def static_size(tokens: int) -> int:
    """Length of the static cache for a prompt and its answer: one of few, because each is compiled."""
    return max(CACHE_AT_LEAST, power_of_two(tokens))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def _generate(
    prompts: Sequence[Example],
    bounds: Sequence[int],
    speech_llm: SpeechLLM,
    forbidden: Tensor,
    beams: int,
    ngram: int,
    cache: StaticCache | None = None,
    letters: Letters | None = None,
) -> list[list[int]]:
    """`greedy_answers` with beams and the rule against repetitions, of padded prompts: possible in any family."""
    model, text_tokenizer, vocabulary = speech_llm.model, speech_llm.text_tokenizer, speech_llm.vocabulary
    end_id, pad_id = text_tokenizer.eos_token_id, text_tokenizer.pad_token_id
    pad_id = end_id if pad_id is None else pad_id  # Llama and GPT-2 have none
    inputs = {name: tensor.to(model.device) for name, tensor in collate_prompts(prompts, pad_id).items()}
    both_ways = _both_ways(model, vocabulary, **inputs, beams=beams)
    inputs |= model_inputs(model, vocabulary, inputs["input_ids"], join_features(prompts))
    prompt_size = inputs["input_ids"].shape[1]
    rules = LogitsProcessorList([_BoundedText(forbidden, prompt_size, bounds, end_id)])
    if ngram:
        rules.append(_NoRepeats(ngram, prompt_size))
    if letters:
        rules.append(letters.scores(prompt_size, end_id))
    # with a static cache steps are compiled, which a new hook could make happen for each batch
    contiguous = contiguous_states(model) if cache is None else nullcontext()
    with both_ways, contiguous:
        answers = model.generate(
            **inputs,
            logits_processor=rules,
            max_new_tokens=max(bounds) + 1,  # including the end token
            do_sample=False,
            num_beams=beams,
            **({"length_penalty": 0.0} if letters and beams > 1 else {}),  # who leaves out letters pays already
            eos_token_id=end_id,
            pad_token_id=pad_id,
            past_key_values=cache,
        )[:, prompt_size:]
    # behind the end token comes padding
    return [row[~forbidden[row] & (row != end_id)].tolist() for row in answers]


@contextmanager
def _both_ways(
    model: PreTrainedModel | PeftModel,
    vocabulary: AudioVocabulary,
    input_ids: Tensor,
    attention_mask: Tensor,
    beams: int,
) -> Iterator[None]:
    """While active, `generate` reads these padded prompts with the audio in them attending as the vocabulary says."""
    if not vocabulary.prefix_attention:
        yield
        return
    audio = torch.stack([vocabulary.audio_parts(ids) for ids in input_ids]).masked_fill(attention_mask == 0, PADDING)
    audio = audio.repeat_interleave(beams, 0)[:, None, None]  # the beams of an utterance lie side by side

    def replace_mask(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hook.remove()  # what follows is an answer, in which a token sees all before it
        return inputs, named | {"attention_mask": audio}

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hook = base.register_forward_pre_hook(replace_mask, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class _NoRepeats(NoRepeatNGramLogitsProcessor):
    """Forbids repetitions within the answer; the prompt, which may hold a recogniser's text, does not count."""

    def __init__(self, ngram: int, prompt_size: int):
        super().__init__(ngram)
        self.prompt_size = prompt_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids[:, self.prompt_size :], scores)


class _BoundedText(LogitsProcessor):
    """Allows only text and the end token, and only the end token once an answer has its maximum length."""

    def __init__(self, forbidden: Tensor, prompt_size: int, bounds: Sequence[int], end: int):
        self.forbidden, self.prompt_size, self.end = forbidden, prompt_size, end
        self.bounds = torch.tensor(bounds, device=forbidden.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(self.forbidden, -torch.inf)
        full = input_ids.shape[1] - self.prompt_size >= self.bounds
        full = full.repeat_interleave(len(scores) // len(full))  # the beams of an utterance lie side by side
        scores[full] = -torch.inf
        scores[full, self.end] = 0
        return scores
