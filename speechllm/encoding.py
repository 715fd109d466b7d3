"""How speech was encoded: by which audio tokenizer, at which rates, into which kind of data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from tokenizer.audio import pad_waveforms
from tokenizer.errors import InputError
from tokenizer.interface import (
    AudioTokenizer,
    Codes,
    DiscreteTokenizer,
    Features,
    FeatureTokenizer,
    Transcripts,
    require_layers,
)

Speech = Tensor | str  # one utterance: codes long [Q, T], features float [T, C], or a recogniser's text


class DataError(InputError):
    """Encoded speech that cannot be used."""


@dataclass(frozen=True)
class Encoding:
    """How a folder of encoded speech was made; the fingerprint ties it to one audio tokenizer.

    kind: what the audio tokenizer returns. Features need one new token, a placeholder; texts need none.
    """

    fingerprint: str
    sample_rate: int  # Hz
    frame_rate: float  # frames/s, 0 for texts
    layers: int  # codebooks; 1 for features, 0 for texts
    codebook_size: int  # 1 for features, 0 for texts
    kind: Literal["codes", "features", "text"] = "codes"
    width: int = 0  # C, dimensions of a feature
    deduplicated: bool = False  # repeats are merged: frames have no time, and frame_rate is an upper bound
    labels: Sequence[str] = ()  # of whose texts the last dimensions of a feature are probabilities (`CtcCompressor`)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))  # a list, if read from JSON

    @staticmethod
    def of(codec: AudioTokenizer, layers: int | None = None) -> "Encoding":
        """The encoding by the codec's first `layers` codebooks, all when None.

        Raises InputError for codebooks that the codec does not have.
        """
        shape: dict[str, Any]
        if isinstance(codec, DiscreteTokenizer):
            require_layers(layers, codec.num_codebooks)
            shape = {"layers": layers or codec.num_codebooks, "codebook_size": codec.codebook_size}
        elif layers not in (None, 1):
            raise DataError(f"layers={layers}, but only codes have layers, and {type(codec).__name__} returns none")
        elif isinstance(codec, FeatureTokenizer):
            labels = getattr(codec, "labels", ())
            shape = {"layers": 1, "codebook_size": 1, "kind": "features", "width": codec.width, "labels": labels}
        else:
            shape = {"layers": 0, "codebook_size": 0, "kind": "text"}
        return Encoding(
            fingerprint=codec.fingerprint,
            sample_rate=codec.sample_rate,
            frame_rate=codec.frame_rate,
            deduplicated=getattr(codec, "deduplicate", False),
            **shape,
        )

    def encode(self, codec: AudioTokenizer, waveform: Tensor) -> Speech:
        """One waveform float [N] in this encoding, on the CPU."""
        return self.encode_batch(codec, [waveform])[0]

    def encode_batch(self, codec: AudioTokenizer, waveforms: Sequence[Tensor]) -> list[Speech]:
        """Several waveforms float [N_i] in this encoding, on the CPU; equal to those of `encode` up to rounding.

        At once by a codec that says it is `batched`, otherwise one by one.
        """
        if len(waveforms) > 1 and not getattr(codec, "batched", False):
            return [self.encode(codec, waveform) for waveform in waveforms]
        padded, sizes = pad_waveforms(waveforms)
        padded, lengths = padded.to(codec.device), sizes if len(waveforms) > 1 else None
        encoded: Codes | Features | Transcripts
        if self.kind == "codes":
            encoded = cast(DiscreteTokenizer, codec).encode(padded, lengths, layers=self.layers)
        else:
            encoded = codec.encode(padded, lengths)
        speech = [encoded.utterance(index) for index in range(len(waveforms))]
        return [one if isinstance(one, str) else one.cpu() for one in speech]

    @property
    def readable(self) -> bool:
        """Whether its speech says something without a language model: texts, and features with labels."""
        return self.kind == "text" or bool(self.labels)

    def spelled(self, speech: Speech) -> str:
        """What readable speech says: its text, or the likeliest label of each feature."""
        if isinstance(speech, str):
            return speech
        likeliest = speech[:, -len(self.labels) :].argmax(1)
        return "".join(self.labels[label] for label in likeliest.tolist()).strip()

    def require(self, fingerprint: str, holder: str) -> None:
        """Raise DataError unless this speech was encoded by the codec that `holder` was made with."""
        if self.fingerprint != fingerprint:
            raise DataError(
                f"the codes are from codec {self.fingerprint}, but {holder} is for codec {fingerprint}: codes of "
                "different codecs mean different sounds; encode the speech with the same codec"
            )
