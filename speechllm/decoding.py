"""Speech in, text out."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from speechllm.model import SpeechLLM
from speechllm.prompt import collate_prompts, transcription_prompt
from tokenizer import load_audio

TOKENS_PER_SECOND = 12  # upper bound of the answer's length; fast English speech has about 6 text tokens a second
TOKENS_AT_LEAST = 16


class _TextOnly(LogitsProcessor):
    """Only text and the end token may be answered: audio tokens and spare rows get no probability."""

    def __init__(self, forbidden: Tensor):
        self.forbidden = forbidden

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.forbidden, -torch.inf)


def transcribe(
    speech: Sequence[str | Path | Tensor], speech_llm: SpeechLLM, batch_size: int = 16, progress: bool = False
) -> list[str]:
    """Texts of recordings, given as files or as waveforms float [N] at the codec's rate, in the order given.

    Raises AudioError for a file that cannot be used.
    """
    codec = speech_llm.codec
    if codec is None:
        raise ValueError("this SpeechLLM has no codec: load it with load_speech_llm, or use transcribe_codes")
    device = codec.codebooks.device
    layers = speech_llm.vocabulary.encoding.layers
    codes = []
    for item in tqdm(speech, "encode", disable=not progress):
        waveform = item if isinstance(item, Tensor) else load_audio(item, codec.sample_rate)
        codes.append(codec.encode(waveform[None].to(device), layers=layers).ids[0].cpu())
    return transcribe_codes(codes, speech_llm, batch_size, progress)


@torch.no_grad()
def transcribe_codes(
    codes: Sequence[Tensor], speech_llm: SpeechLLM, batch_size: int = 16, progress: bool = False
) -> list[str]:
    """Texts of utterances given as codes long [Q, T]: greedy, in batches of similar length, bounded by duration."""
    model, text_tokenizer, vocabulary = speech_llm.model, speech_llm.text_tokenizer, speech_llm.vocabulary
    was_training = model.training
    model.eval()
    allowed = LogitsProcessorList([_TextOnly(forbidden_ids(speech_llm).to(model.device))])
    texts = [""] * len(codes)
    order = sorted(range(len(codes)), key=lambda i: -codes[i].shape[1])
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    for batch in tqdm(batches, "transcribe", disable=not progress):
        prompts = [transcription_prompt(codes[i], vocabulary, text_tokenizer) for i in batch]
        inputs = collate_prompts(prompts, text_tokenizer.pad_token_id)
        bounds = [answer_bound(codes[i].shape[1] / vocabulary.encoding.frame_rate) for i in batch]
        answers = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            logits_processor=allowed,
            max_new_tokens=max(bounds),
            do_sample=False,
            num_beams=1,
            eos_token_id=text_tokenizer.eos_token_id,
            pad_token_id=text_tokenizer.pad_token_id,
        )
        answers = answers[:, inputs["input_ids"].shape[1] :]
        for i, answer, bound in zip(batch, answers, bounds, strict=True):
            texts[i] = text_tokenizer.decode(answer[:bound], skip_special_tokens=True).strip()
    model.train(was_training)
    return texts


def answer_bound(duration_s: float) -> int:
    """Most tokens an answer may have: a model that runs away must stop somewhere."""
    return TOKENS_AT_LEAST + int(TOKENS_PER_SECOND * duration_s)


def forbidden_ids(speech_llm: SpeechLLM) -> Tensor:
    """bool [rows]: token ids that are neither text nor the end token."""
    text_tokenizer = speech_llm.text_tokenizer
    forbidden = torch.zeros(speech_llm.model.get_input_embeddings().weight.shape[0], dtype=torch.bool)
    specials = [index for index, token in text_tokenizer.added_tokens_decoder.items() if token.special]
    forbidden[specials] = True
    forbidden[speech_llm.vocabulary.new_ids] = True
    forbidden[len(text_tokenizer) :] = True
    forbidden[text_tokenizer.eos_token_id] = False
    return forbidden
