"""Evaluators of reconstructed or converted speech: speaker embeddings and recognised words."""

from collections.abc import Iterator
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.audio import resample
from tokenizer.interface import AudioTokenizer, Transcripts
from tokenizer.metrics.quality import resample_to_16_khz


class SpeakerEncoder(Protocol):
    """A network that embeds speakers, such as a `SpeakerTeacher`."""

    def embedding(self, waveform: Tensor) -> Tensor:
        """waveform float [B, N] at 16 kHz -> float [B, C]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights, as `nn.Module.parameters` returns them."""


def speaker_embedding(speaker: SpeakerEncoder, waveform: Tensor, sample_rate: int) -> Tensor:
    """Unit-length embedding of the speaker of a waveform float [N]: float [C] on the CPU.

    The dot product of two is the speaker similarity. Raises QualityError as `resample_to_16_khz` does.
    """
    speech = resample_to_16_khz(waveform, sample_rate).to(next(speaker.parameters()).device)
    return F.normalize(speaker.embedding(speech[None])[0], dim=0).cpu()


def recognized_text(recognizer: AudioTokenizer, waveform: Tensor, sample_rate: int) -> str:
    """The text that the recognizer returns for a waveform float [N]."""
    speech = resample(waveform.nan_to_num(0, 0, 0), sample_rate, recognizer.sample_rate)
    transcripts = recognizer.encode(speech[None].to(recognizer.device))
    assert isinstance(transcripts, Transcripts)
    return transcripts.utterance(0)
