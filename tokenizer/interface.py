"""The interface of all audio tokenizers: what they take and what they return."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from tokenizer.errors import InputError


@dataclass(frozen=True)
class Codes:
    """Discrete tokens of a batch of utterances.

    ids: long [B, Q, T], zero beyond an utterance's length; layer 0 is the first codebook.
    lengths: long [B], in frames.
    samples: long [B], the number of encoded samples where known; `decode` returns exactly as many.
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
        """The codes of the first `layers` codebooks only."""
        return Codes(self.ids[:, :layers], self.lengths, self.samples)

    def sizes(self, hop: int) -> Tensor:
        """Samples of each utterance, long [B]: as many as were encoded, or, where that is not known, its frames hold.

        hop: samples a frame.
        """
        return self.samples if self.samples is not None else self.lengths * hop

    def require(self, num_codebooks: int, codebook_size: int, hop: float | None = None) -> None:
        """Raise InputError unless a codec with so many codebooks can have made these codes.

        hop: samples a frame, for a codec whose frames hold all samples but for a part of one more.
        """
        if self.ids.ndim != 3 or self.ids.is_floating_point() or not 1 <= self.ids.shape[1] <= num_codebooks:
            raise InputError(
                f"expected codes long [B, 1..{num_codebooks}, T], got {self.ids.dtype} {list(self.ids.shape)}"
            )
        if self.ids.numel() and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < codebook_size:
            raise InputError(
                f"codes must be 0..{codebook_size - 1}, got {int(self.ids.min())}..{int(self.ids.max())}: "
                "they are another codec's, or damaged"
            )
        if (
            len(self.lengths) != len(self)
            or not 0 <= int(self.lengths.min()) <= int(self.lengths.max()) <= self.ids.shape[2]
        ):
            raise InputError(f"the lengths {self.lengths.tolist()} are not those of codes {list(self.ids.shape)}")
        if self.samples is not None and (len(self.samples) != len(self) or int(self.samples.min()) < 0):
            raise InputError(f"expected the numbers of samples of {len(self)} utterances, got {self.samples.tolist()}")
        if self.samples is not None and hop is not None:
            for samples, frames in zip(self.samples.tolist(), self.lengths.tolist(), strict=True):
                if samples > (frames + 1) * hop:
                    raise InputError(f"{samples} samples are more than {frames} frames of codes hold")

    @staticmethod
    def from_utterances(utterances: Sequence[Tensor], samples: Tensor | None = None) -> "Codes":
        """Pad utterances long [Q, T_i] into one batch."""
        lengths = torch.tensor([codes.shape[1] for codes in utterances])
        ids = torch.zeros(len(utterances), utterances[0].shape[0], int(lengths.max()), dtype=torch.long)
        for row, codes in zip(ids, utterances, strict=True):
            row[:, : codes.shape[1]] = codes
        return Codes(ids, lengths, samples)


def require_layers(layers: int | None, num_codebooks: int) -> None:
    """Raise InputError for more `layers` than a codec with so many codebooks has, or none; None means all."""
    if layers is not None and not 1 <= layers <= num_codebooks:
        raise InputError(f"layers must be 1..{num_codebooks}, got {layers}")


@dataclass(frozen=True)
class Features:
    """Continuous features: values float [B, T, C], zero beyond an utterance's length; lengths long [B], in frames."""

    values: Tensor
    lengths: Tensor

    def utterance(self, index: int) -> Tensor:
        """The features of one utterance without padding, float [T, C]."""
        return self.values[index, : int(self.lengths[index])]


@dataclass(frozen=True)
class Transcripts:
    """The output of a speech recogniser: one text per utterance."""

    texts: list[str]

    def utterance(self, index: int) -> str:
        """The text of one utterance."""
        return self.texts[index]


class _ByNames(type(Protocol)):  # type: ignore[misc]
    """`isinstance` of a protocol asks which names there are, as since Python 3.12, and computes no properties.

    A fingerprint hashes all weights. Names that only an instance has count, too, such as the buffers of an `nn.Module`.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        protocols = [base for base in cls.__mro__ if getattr(base, "_is_protocol", False)]
        if cls not in protocols:
            return super().__instancecheck__(instance)
        names = {name for protocol in protocols for name in vars(protocol) if not name.startswith("_")}
        return all(hasattr(type(instance), name) or hasattr(instance, name) for name in names)


@runtime_checkable
class AudioTokenizer(Protocol, metaclass=_ByNames):
    """Anything that turns waveforms into input for a language model; `load_tokenizer` loads one by its name."""

    @property
    def sample_rate(self) -> int:
        """Sample rate of the waveforms that `encode` takes, in Hz."""

    @property
    def frame_rate(self) -> float:
        """Frames per second that `encode` returns; 0 if it returns text."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights and configuration; output of tokenizers with different fingerprints must not be mixed."""

    @property
    def device(self) -> torch.device:
        """The device on which `encode` expects its waveforms."""

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Codes | Features | Transcripts:
        """waveform float [B, N] in [-1, 1]; lengths long [B] in samples (all N when None).

        The result for an utterance does not depend on the batch, except for the rounding of float32: what follows it
        there is neither seen nor normalised with it. One that takes several in less time than one after the other says
        so by an attribute `batched = True`; the others are given one at a time where speed counts.
        """

    def to(self, device: torch.device | str, /) -> Self:
        """Move the weights, as `nn.Module.to` does."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights, as `nn.Module.parameters` returns them."""

    def save_pretrained(self, folder: str | Path, /) -> object:
        """Write everything that `load_tokenizer(folder)` needs."""


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
        """As `AudioTokenizer.encode`, with the first `layers` codebooks only (all when None)."""


@runtime_checkable
class FeatureTokenizer(AudioTokenizer, Protocol):
    """An audio tokenizer that returns `Features`."""

    @property
    def width(self) -> int:
        """C, the dimension of the features."""


@runtime_checkable
class Codec(DiscreteTokenizer, Protocol):
    """A discrete tokenizer that can decode its codes to speech."""

    def decode(self, codes: Codes) -> Tensor:
        """Waveforms float [B, N]."""
