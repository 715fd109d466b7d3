"""Speech in, text out."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from speechllm.encoding import Speech
from speechllm.model import SpeechLLM
from speechllm.projector import model_inputs
from speechllm.prompt import Example, collate_prompts, join_features, transcription_prompt
from tokenizer.audio import load_audio

TOKENS_PER_SECOND = 12  # upper bound of an answer's length; fast English speech has about 6 text tokens per second
TOKENS_AT_LEAST = 16
COMPRESSION = 2.4  # ratio of zlib: speech stays below it, loops do not (Radford et al. 2022, section 4.5)
REFUSAL = re.compile(r"\b(as an ai|ai language model|ai assistant)\b", re.IGNORECASE)
FALLBACK_BEAMS = 4
FALLBACK_NGRAM = 5  # tokens; a shorter one would forbid repeating a word that has many tokens


@dataclass(frozen=True)
class Transcription:
    """A recognised text. runaway: why the first answer was rejected (`runaway_reason`), or None if it was accepted.

    repaired: the text is the fallback's answer.
    """

    text: str
    runaway: str | None = None
    repaired: bool = False


def transcribe(
    speech: Iterable[str | Path | Tensor],
    speech_llm: SpeechLLM,
    batch_size: int = 16,
    progress: bool = False,
    beams: int = 1,
    fallback: bool = False,
) -> list[str]:
    """Texts of recordings, given as files or as waveforms float [N] at the codec's rate, in the order given.

    They are encoded one by one, so that an iterator need hold no more than one waveform in memory.

    beams, fallback: as in `recognize`. Raises AudioError for an unusable file.
    """
    codec = speech_llm.codec
    if codec is None:
        raise ValueError("this SpeechLLM has no codec: load it with load_speech_llm, or use transcribe_codes")
    encoded, durations_s = [], []
    for item in tqdm(speech, "encode", disable=not progress):
        waveform = item if isinstance(item, Tensor) else load_audio(item, codec.sample_rate)
        encoded.append(speech_llm.vocabulary.encoding.encode(codec, waveform))
        durations_s.append(len(waveform) / codec.sample_rate)
    found = recognize(encoded, speech_llm, batch_size, progress, beams, fallback, durations_s)
    return [transcription.text for transcription in found]


def transcribe_codes(
    codes: Sequence[Tensor],
    speech_llm: SpeechLLM,
    batch_size: int = 16,
    progress: bool = False,
    beams: int = 1,
    fallback: bool = False,
) -> list[str]:
    """Texts of utterances given as codes long [Q, T], in the order given; the rest as in `recognize`."""
    return [found.text for found in recognize(codes, speech_llm, batch_size, progress, beams, fallback)]


def recognize(
    speech: Sequence[Speech],
    speech_llm: SpeechLLM,
    batch_size: int = 16,
    progress: bool = False,
    beams: int = 1,
    fallback: bool = False,
    durations_s: Sequence[float] | None = None,
) -> list[Transcription]:
    """Transcriptions of encoded utterances (`speech_of`), in the order given.

    Greedy with one beam, otherwise beam search. Answers contain only text, at most `answer_bound` tokens of it, and do
    not depend on the batch. batch_size: answers decoded at a time, so that more beams need no more memory.
    fallback: decode runaway answers again, by beam search without repeated 5-grams, and replace them if that helps.
    durations_s: of the utterances; may be None if the number of frames tells it (codes without merged repeats, and
    features).
    """
    text_tokenizer, encoding = speech_llm.text_tokenizer, speech_llm.vocabulary.encoding
    if durations_s is None:
        axis = -1 if encoding.kind == "codes" else 0
        frames = [utterance.shape[axis] for utterance in speech if isinstance(utterance, Tensor)]
        if len(frames) < len(speech):
            raise ValueError("the duration of the speech is not known from texts: pass durations_s")
        durations_s = [count / encoding.frame_rate for count in frames]
    prompts = [transcription_prompt(utterance, speech_llm.vocabulary, text_tokenizer) for utterance in speech]
    bounds = [answer_bound(duration_s) for duration_s in durations_s]
    return answer(prompts, bounds, speech_llm, batch_size, progress, beams, fallback)


def answer(
    prompts: Sequence[Example],
    bounds: Sequence[int],
    speech_llm: SpeechLLM,
    batch_size: int = 16,
    progress: bool = False,
    beams: int = 1,
    fallback: bool = False,
) -> list[Transcription]:
    """Answers to prompts, in the order given, of at most so many tokens each; the rest as in `recognize`."""
    found = _decode(prompts, bounds, speech_llm, batch_size, progress, beams)
    runaways = [i for i, first in enumerate(found) if first.runaway] if fallback else []
    again = [prompts[i] for i in runaways], [bounds[i] for i in runaways]
    beams = max(beams, FALLBACK_BEAMS)
    second = _decode(*again, speech_llm, batch_size, progress, beams, FALLBACK_NGRAM)
    for i, other in zip(runaways, second, strict=True):
        if other.runaway is None:
            found[i] = replace(found[i], text=other.text, repaired=True)
    return found


def runaway_reason(text: str, at_bound: bool) -> str | None:
    """Why an answer is rejected: "empty", "looped", "refused" or "bound" (the maximum length is reached); else None."""
    data = text.encode()
    if not data:
        return "empty"
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


def answer_bound(duration_s: float) -> int:
    """Maximum number of tokens in an answer, so that a runaway model stops."""
    return TOKENS_AT_LEAST + int(TOKENS_PER_SECOND * duration_s)


def forbidden_ids(speech_llm: SpeechLLM) -> Tensor:
    """bool [rows]: the token ids that are neither text nor the end token."""
    text_tokenizer = speech_llm.text_tokenizer
    forbidden = torch.ones(speech_llm.vocabulary.size, dtype=torch.bool)
    forbidden[list(text_tokenizer.get_vocab().values())] = False
    specials = [index for index, token in text_tokenizer.added_tokens_decoder.items() if token.special]
    forbidden[specials] = True
    forbidden[speech_llm.vocabulary.new_ids] = True
    forbidden[text_tokenizer.eos_token_id] = False
    return forbidden


@torch.no_grad()
def _decode(
    prompts: Sequence[Example],
    bounds: Sequence[int],
    speech_llm: SpeechLLM,
    batch_size: int,
    progress: bool,
    beams: int,
    ngram: int = 0,
) -> list[Transcription]:
    """One pass, in batches of similar length. ngram: no sequence of that many tokens is repeated; 0: no such rule."""
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    model, text_tokenizer, vocabulary = speech_llm.model, speech_llm.text_tokenizer, speech_llm.vocabulary
    end_id, pad_id = text_tokenizer.eos_token_id, text_tokenizer.pad_token_id
    pad_id = end_id if pad_id is None else pad_id  # Llama and GPT-2 have none
    was_training = model.training
    model.eval()
    forbidden = forbidden_ids(speech_llm).to(model.device)
    found = [Transcription("")] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = max(1, batch_size // beams)
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    for batch in tqdm(batches, "decode again" if ngram else "transcribe", disable=not (progress and batches)):
        inputs = collate_prompts([prompts[i] for i in batch], pad_id)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        inputs |= model_inputs(model, vocabulary, inputs["input_ids"], join_features([prompts[i] for i in batch]))
        prompt_size = inputs["input_ids"].shape[1]
        limits = [bounds[i] for i in batch]
        rules = LogitsProcessorList([_BoundedText(forbidden, prompt_size, limits, end_id)])
        if ngram:
            rules.append(_NoRepeats(ngram, prompt_size))
        answers = model.generate(
            **inputs,
            logits_processor=rules,
            max_new_tokens=max(limits) + 1,  # including the end token
            do_sample=False,
            num_beams=beams,
            eos_token_id=end_id,
            pad_token_id=pad_id,
        )[:, prompt_size:]
        lengths = (~forbidden[answers] & (answers != end_id)).sum(1).tolist()
        texts = text_tokenizer.batch_decode(answers, skip_special_tokens=True)
        for i, text, length, bound in zip(batch, map(str.strip, texts), lengths, limits, strict=True):
            found[i] = Transcription(text, runaway_reason(text, length >= bound))
    model.train(was_training)
    return found


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
