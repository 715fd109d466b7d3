"""Judges of speech that a codec gave back or converted: whose voice a network hears in it, and which words."""

from collections.abc import Iterator
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import resample

from tokenizer.interface import AudioTokenizer, Transcripts
from tokenizer.metrics.quality import resample_to_16_khz


class SpeakerEncoder(Protocol):
    """A network that tells voices apart, such as a `SpeakerTeacher`."""

    def embedding(self, waveform: Tensor) -> Tensor:
        """waveform float [B, N] at 16 kHz -> float [B, C]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights, as of any torch module."""


def speaker_embedding(speaker: SpeakerEncoder, waveform: Tensor, sample_rate: int) -> Tensor:
    """The voice of a waveform float [N], of unit length, float [C] on the CPU.

    The scalar product of two is the cosine similarity of the speakers. Raises QualityError as `at_16_khz` does.
    """
    speech = resample_to_16_khz(waveform, sample_rate).to(next(speaker.parameters()).device)
    return F.normalize(speaker.embedding(speech[None])[0], dim=0).cpu()


def recognized_text(recognizer: AudioTokenizer, waveform: Tensor, sample_rate: int) -> str:
    """The words that the recognizer hears in a waveform float [N]."""
    speech = resample(waveform, sample_rate, recognizer.sample_rate)
    heard = recognizer.encode(speech[None].to(recognizer.device))
    assert isinstance(heard, Transcripts)
    return heard.utterance(0)
