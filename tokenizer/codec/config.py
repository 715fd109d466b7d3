"""The configuration of a codec. Does not import torch, so that a configuration can be checked quickly."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from tokenizer.rates import HOP_LENGTH
from tokenizer.settings import NOT_EMPTY, CodebookSize, Count, Settings

Strides = Annotated[tuple[Count, ...], NOT_EMPTY]


@dataclass
class SpeechCodecConfig(Settings):
    """Configuration of a codec; the defaults are the paper's: 16 kHz, hop 320 (50 frames/s), 8 codebooks of 1024.

    Raises SettingsError listing all problems.
    """

    sample_rate: Count = 16_000  # Hz
    body: Literal["seanet", "convnext"] = "seanet"  # convnext: at the frame rate, many times cheaper
    front_end: Literal["seanet", "log_mel"] = "seanet"  # of body seanet; log_mel: a cheaper encoder for small runs
    dimension: Count = 128  # D, dimension of the latents and the codebooks (EnCodec 128, SpeechTokenizer 1024)
    n_filters: Count = 32  # width of the first layer (EnCodec 32, SpeechTokenizer 64)
    strides: Strides = (2, 4, 5, 8)  # in the order of the encoder; their product is the hop in samples
    lstm: Literal["none", "forward", "bidirectional"] = "forward"  # of the encoder
    width: Count = 384  # of body convnext, which has no n_filters and no lstm
    depth: Count = 8  # of body convnext: blocks in the encoder, and in the decoder
    phases: Literal["predicted", "griffin_lim"] = "predicted"  # of body convnext; griffin_lim: from its magnitudes
    causal: bool = False
    norm: Literal["weight_norm", "batch_norm"] = "weight_norm"  # batch_norm also standardises the latents
    pad_mode: Literal["reflect", "constant"] = "reflect"  # of body seanet
    # split: the first codebook beside the cascade of the others; units: layer 0 are the codes of another tokenizer
    quantizer: Literal["residual", "split", "units"] = "residual"
    num_codebooks: Count = 8  # Q
    codebook_size: CodebookSize = 1024  # K
    codebook_dim: Count | None = None  # of normalised codes, searched for in a space of so few dimensions (DAC: 8)

    def __post_init__(self) -> None:
        self.strides = tuple(self.strides)
        super().__post_init__()

    def contradictions(self) -> Iterable[str]:
        for name, hint in get_type_hints(type(self)).items():
            if (choices := get_args(hint)) and get_origin(hint) is Literal and getattr(self, name) not in choices:
                yield f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
        if self.front_end == "log_mel" and (self.causal or self.hop_length != HOP_LENGTH):
            yield "front_end log_mel needs causal: false and strides with a product of 320"
        if self.quantizer == "split" and self.num_codebooks < 2:
            yield f"quantizer split needs at least 2 codebooks, got {self.num_codebooks}"
        if self.quantizer == "split" and self.dimension % 2:
            yield f"quantizer split needs an even dimension, got {self.dimension}"
        if self.quantizer == "units" and (self.causal or self.codebook_dim):
            yield "quantizer units needs causal: false, as units see whole utterances, and no codebook_dim"
        if self.phases == "griffin_lim" and (self.body != "convnext" or self.causal):
            yield "phases griffin_lim needs body: convnext and causal: false, as it looks most of a second ahead"
        if self.body == "convnext" and self.hop_length % 4:
            yield "body convnext needs strides with a product that is a multiple of 4"
        if self.body == "convnext" and self.width % (2 * (heads := max(1, self.width // 64))):
            yield f"body convnext needs a width that is a multiple of {2 * heads}, for {heads} heads, got {self.width}"
        if self.body == "seanet" and self.causal and self.lstm == "bidirectional":
            yield "a causal codec cannot have a bidirectional lstm: choose forward or none"

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.strides)
