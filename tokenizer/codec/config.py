"""The configuration of a codec. Does not import torch, so that a configuration can be checked quickly."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from tokenizer.errors import InputError
from tokenizer.rates import HOP_LENGTH


@dataclass
class SpeechCodecConfig:
    """Configuration of a codec; the defaults are the paper's: 16 kHz, hop 320 (50 frames/s), 8 codebooks of 1024.

    Raises InputError listing all problems.
    """

    sample_rate: int = 16_000  # Hz
    body: Literal["seanet", "convnext"] = "seanet"  # convnext: at the frame rate, many times cheaper
    front_end: Literal["seanet", "log_mel"] = "seanet"  # of body seanet; log_mel: a cheaper encoder for small runs
    dimension: int = 128  # D, dimension of the latents and the codebooks (EnCodec 128, SpeechTokenizer 1024)
    n_filters: int = 32  # width of the first layer (EnCodec 32, SpeechTokenizer 64)
    strides: tuple[int, ...] = (2, 4, 5, 8)  # in the order of the encoder; their product is the hop in samples
    lstm: Literal["none", "forward", "bidirectional"] = "forward"  # of the encoder
    width: int = 384  # of body convnext, which has no n_filters and no lstm
    depth: int = 8  # of body convnext: blocks in the encoder, and in the decoder
    causal: bool = False
    norm: Literal["weight_norm", "batch_norm"] = "weight_norm"  # batch_norm also standardises the latents
    pad_mode: Literal["reflect", "constant"] = "reflect"
    quantizer: Literal["residual", "split"] = "residual"  # split: the first codebook beside the cascade of the others
    num_codebooks: int = 8  # Q
    codebook_size: int = 1024  # K

    def __post_init__(self) -> None:
        self.strides = tuple(self.strides)
        problems = [
            f"{name} must be positive, got {getattr(self, name)}"
            for name in ("sample_rate", "dimension", "n_filters", "width", "depth", "num_codebooks", "codebook_size")
            if getattr(self, name) <= 0
        ]
        for name, hint in get_type_hints(type(self)).items():
            if (choices := get_args(hint)) and get_origin(hint) is Literal and getattr(self, name) not in choices:
                problems.append(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.codebook_size > 65_536:
            problems.append(f"codebook_size is at most 65536 (codes are stored as uint16), got {self.codebook_size}")
        if self.front_end == "log_mel" and (self.causal or self.hop_length != HOP_LENGTH):
            problems.append("front_end log_mel needs causal: false and strides with a product of 320")
        if self.quantizer == "split" and self.num_codebooks < 2:
            problems.append(f"quantizer split needs at least 2 codebooks, got {self.num_codebooks}")
        if self.body == "convnext" and (self.hop_length % 4 or self.causal):
            problems.append("body convnext needs strides with a product that is a multiple of 4, and causal: false")
        if self.causal and self.lstm == "bidirectional":
            problems.append("a causal codec cannot have a bidirectional lstm: choose forward or none")
        if problems:
            raise InputError("SpeechCodecConfig: " + "; ".join(problems))

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.strides)
