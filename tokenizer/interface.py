"""What every audio tokenizer takes and returns: one interface for all the ways to turn speech into tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Codes:
    """Discrete tokens of a batch of utterances.

    ids: long [B, Q, T], zero beyond an utterance's length; layer 0 is the first codebook.
    lengths: long [B], frames.
    samples: long [B], the number of samples that were encoded, where it is known: `decode` returns exactly as many.
    """

    ids: Tensor
    lengths: Tensor
    samples: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def utterance(self, index: int) -> Tensor:
        """The codes of one utterance without padding, long [Q, T]."""
        return self.ids[index, :, : int(self.lengths[index])]

    def first(self, layers: int) -> "Codes":
        """Only the first `layers` codebooks."""
        return Codes(self.ids[:, :layers], self.lengths, self.samples)

    @staticmethod
    def from_utterances(utterances: Sequence[Tensor], samples: Tensor | None = None) -> "Codes":
        """Pad utterances long [Q, T_i] to one batch."""
        lengths = torch.tensor([codes.shape[1] for codes in utterances])
        ids = torch.zeros(len(utterances), utterances[0].shape[0], int(lengths.max()), dtype=torch.long)
        for row, codes in zip(ids, utterances, strict=True):
            row[:, : codes.shape[1]] = codes
        return Codes(ids, lengths, samples)


@dataclass(frozen=True)
class Features:
    """Continuous "soft" tokens: values float [B, T, C], zero beyond an utterance's length; lengths long [B], frames."""

    values: Tensor
    lengths: Tensor

    def utterance(self, index: int) -> Tensor:
        """The features of one utterance without padding, float [T, C]."""
        return self.values[index, : int(self.lengths[index])]


@dataclass(frozen=True)
class Transcripts:
    """What a recogniser heard: one text per utterance."""

    texts: list[str]

    def utterance(self, index: int) -> str:
        """The text of one utterance."""
        return self.texts[index]


@runtime_checkable
class AudioTokenizer(Protocol):
    """Anything that turns waveforms into something a language model can read; `load_tokenizer` finds it by name."""

    @property
    def sample_rate(self) -> int:
        """Samples per second of the waveforms `encode` takes, Hz."""

    @property
    def frame_rate(self) -> float:
        """Frames per second of what `encode` returns; 0 where it returns text."""

    @property
    def fingerprint(self) -> str:
        """Identity of weights and configuration: what two fingerprints encoded must never be mixed."""

    @property
    def device(self) -> torch.device:
        """Where the waveforms for `encode` must be."""

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Codes | Features | Transcripts:
        """waveform float [B, N] in [-1, 1]; lengths long [B] in samples (all of N when None).

        An utterance gets exactly the same in any batch: each runs by itself.
        """

    def to(self, device: torch.device | str, /) -> Self:
        """Move the weights, as of any torch module."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights, as of any torch module."""

    def save_pretrained(self, folder: str | Path, /) -> object:
        """Write everything `load_tokenizer(folder)` needs."""


@runtime_checkable
class DiscreteTokenizer(AudioTokenizer, Protocol):
    """An audio tokenizer with codebooks."""

    @property
    def num_codebooks(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    @property
    def codebooks(self) -> Tensor:
        """Code vectors, float [Q, K, D]."""

    def encode(self, waveform: Tensor, lengths: Tensor | None = None, layers: int | None = None) -> Codes:
        """As `AudioTokenizer.encode`; only the first `layers` codebooks where given."""


@runtime_checkable
class FeatureTokenizer(AudioTokenizer, Protocol):
    """An audio tokenizer that returns `Features`."""

    @property
    def width(self) -> int:
        """C, dimensions of a feature."""


@runtime_checkable
class Codec(DiscreteTokenizer, Protocol):
    """A discrete tokenizer that can speak its codes again."""

    def decode(self, codes: Codes) -> Tensor:
        """Waveforms float [B, N]."""
