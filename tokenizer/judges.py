"""Judges of speech that a codec gave back or converted: whose voice a network hears in it, and which words."""

import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import resample

from tokenizer.interface import AudioTokenizer, Transcripts
from tokenizer.loading import load_tokenizer
from tokenizer.quality import at_16_khz
from tokenizer.teachers import SpeakerTeacher


def embed_voice(speaker: SpeakerTeacher, waveform: Tensor, sample_rate: int) -> Tensor:
    """The voice of a waveform float [N], of unit length, float [C] on the CPU.

    The scalar product of two is the cosine similarity of the speakers. Raises QualityError as `at_16_khz` does.
    """
    speech = at_16_khz(waveform, sample_rate).to(next(speaker.parameters()).device)
    return F.normalize(speaker.embedding(speech[None])[0], dim=0).cpu()


def load_judge(name: str) -> AudioTokenizer:
    """A recogniser as the judge of words, `recognizer:NAME` for `load_tokenizer`; ValueError for what gives no text."""
    judge = load_tokenizer(name)
    if judge.frame_rate:
        raise ValueError(f"{name} gives no text: a judge of words is a recogniser, recognizer:FOLDER_OR_HUB_NAME")
    return judge


def hear(judge: AudioTokenizer, waveform: Tensor, sample_rate: int) -> str:
    """The words that the judge hears in a waveform float [N]."""
    speech = resample(waveform, sample_rate, judge.sample_rate)
    heard = judge.encode(speech[None].to(judge.device))
    assert isinstance(heard, Transcripts)
    return heard.utterance(0)
