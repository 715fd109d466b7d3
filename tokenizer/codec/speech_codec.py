"""The speech codec: encoder, residual vector quantiser, decoder (paper, eqs. 1 to 3)."""

import contextlib
import itertools
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.audio import fit_length, pad_waveforms
from tokenizer.codec.batch_norm import BatchNorm1d
from tokenizer.codec.config import SpeechCodecConfig
from tokenizer.codec.convnext import ConvNeXtDecoder, ConvNeXtEncoder
from tokenizer.codec.log_mel import LogMelEncoder
from tokenizer.codec.model_card import CODEC_CARD
from tokenizer.codec.quantizer import ResidualVectorQuantizer
from tokenizer.codec.seanet import ConvStyle, SEANetDecoder, SEANetEncoder
from tokenizer.codec.streaming import ChunkedDecoder, ChunkedEncoder, in_chunks
from tokenizer.errors import InputError
from tokenizer.frames import frame_count, split_utterances
from tokenizer.interface import Codes, DiscreteTokenizer, require_layers
from tokenizer.pretrained import (
    check_folder,
    describe,
    fill_weights,
    module_fingerprint,
    read_pretrained_json,
    read_weights,
)
from tokenizer.reading import reading

UNITS = "units"  # subfolder of the tokenizer whose codes are layer 0
CHUNK_S = 60.0  # longer utterances are processed in chunks of this length, to bound memory


class SpeechCodec(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="speechllm",
    tags=["audio", "speech", "codec"],
    model_card_template=CODEC_CARD,
):
    """Encodes speech to codes at a fixed frame rate and decodes them.

    >>> codec = SpeechCodec(SpeechCodecConfig(n_filters=4, dimension=16, codebook_size=32)).eval()
    >>> codes = codec.encode(torch.zeros(1, 16_000))
    >>> codes.ids.shape, codec.decode(codes).shape
    (torch.Size([1, 8, 50]), torch.Size([1, 16000]))
    """

    batched = True
    units: DiscreteTokenizer | None

    def __init__(self, config: SpeechCodecConfig, units: DiscreteTokenizer | None = None):
        """units: of quantizer units, the tokenizer whose codes are layer 0; frozen, and saved in a subfolder.

        Raises InputError if it is missing, or makes other codes than this codec has.
        """
        super().__init__()
        _check_units(config, units)
        self.config = config
        object.__setattr__(self, "units", units)  # no submodule: its weights are neither trained nor the codec's
        self.encoder, self.decoder = _body(config)
        # without it, a small, briefly trained encoder returns a constant plus a little signal, and k-means finds only
        # a few codes; a fixed scale also makes loss weights comparable between runs
        self.latent_norm = BatchNorm1d(config.dimension, affine=False) if config.norm == "batch_norm" else None
        self.quantizer = ResidualVectorQuantizer(
            config.dimension,
            config.num_codebooks,
            config.codebook_size,
            config.quantizer == "split",
            config.codebook_dim,
        )

    @property
    def device(self) -> torch.device:
        return self.codebooks.device

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return self.config.hop_length

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.hop_length

    @property
    def num_codebooks(self) -> int:
        return self.config.num_codebooks

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def codebooks(self) -> Tensor:
        return self.quantizer.codebooks

    @property
    def fingerprint(self) -> str:
        """Hash of the configuration and all weights: see `module_fingerprint`."""
        settings = asdict(self.config)
        # codecs from before there were these settings keep their fingerprint
        for name in ("codebook_dim", "phases"):
            if settings[name] == getattr(SpeechCodecConfig, name):
                del settings[name]
        if self.units is not None:
            settings["units"] = self.units.fingerprint
        return module_fingerprint(self, settings)

    @property
    def additive(self) -> bool:
        """Whether the vectors in `codebooks` of successive layers add up, as they do unless each has its own space."""
        return self.config.codebook_dim is None

    @property
    def branches(self) -> list[range]:
        """The layers of each cascade: all, or the first one and the others beside it."""
        return self.quantizer.branches

    @property
    def bounded(self) -> bool:
        """Whether memory does not grow with the utterance: every layer but a bidirectional LSTM works in chunks."""
        config = self.config
        if self.units is not None:  # which see the whole
            return False
        return config.body == "convnext" or config.front_end != "seanet" or config.lstm != "bidirectional"

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As of any module; what gives the units moves along."""
        super().to(*args, **kwargs)
        if self.units is not None:
            self.units.to(self.device)
        return self

    def given_codes(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor | None:
        """The codes of layer 0 that are another tokenizer's, long [B, T]; None if the codec searches them itself."""
        if self.units is None:
            return None
        with torch.autocast(self.device.type, enabled=False):  # the same as without a training around it
            ids = self.units.encode(waveform.to(self.units.device), lengths, 1).ids[:, 0].to(self.device)
        return F.pad(ids, (0, frame_count(waveform.shape[1], self.hop_length) - ids.shape[1]))

    def latents(self, waveform: Tensor) -> Tensor:
        """z0 of eq. 1: waveform float [B, N] -> float [B, D, T], T = ceil(N / hop)."""
        z = self.encoder(waveform[:, None])
        return z if self.latent_norm is None else self.latent_norm(z)

    def reconstruct(self, latents: Tensor, original: Tensor) -> Tensor:
        """Latents float [B, D, T] -> waveform float [B, T * hop], for a loss.

        As the decoder gives it; one that predicts no phases takes those of the waveform `original` float [B, N], and
        the magnitudes without sharpening them.
        """
        known = (original,) if self.config.body == "convnext" else ()
        return self.decoder(latents, *known)[:, 0]

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor | None = None, layers: int | None = None) -> Codes:
        """Waveforms float [B, N] -> codes, T = ceil(n / hop) frames for an utterance of n samples.

        Each utterance is encoded separately, but for the LSTM, so its codes do not depend on the batch and padding
        costs nothing. One of more than 60 s is encoded in chunks, whose last frames wait for the samples that they see,
        to bound memory (a bidirectional LSTM between the convolutions, and the units of layer 0, run on the whole).
        On another machine, with another number of threads, in a stream, in chunks or in another batch, the latents are
        equal up to rounding, and so are the codes, except in frames that are equally close to two codes within that
        rounding.
        Only the first `layers` codebooks are searched (all when None); their codes do not depend on `layers`.
        Raises ValueError if the shape is not [B, N], for NaN or infinite samples, and in training mode; InputError for
        `layers` out of range.
        """
        self._check(layers)
        utterances = split_utterances(waveform, lengths)
        codes = self._encode_each(utterances, layers)
        return Codes.from_utterances(codes, samples=torch.tensor([len(samples) for samples in utterances]))

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """Codes with Q' <= Q layers -> waveforms float [B, N].

        N is the largest of `codes.samples`, or of frames times the hop; shorter ones are zero-padded.
        Each utterance is decoded separately. Raises InputError for codes that this codec cannot have made.
        """
        codes.require(self.num_codebooks, self.codebook_size, self.hop_length)
        sizes = enumerate(codes.sizes(self.hop_length).tolist())
        return pad_waveforms([fit_length(self._decode(codes.utterance(index)), size) for index, size in sizes])[0]

    def _encode_each(self, utterances: list[Tensor], layers: int | None) -> list[Tensor]:
        """Utterances float [N_i] -> the codes of each, long [Q', T_i]."""
        first: list[Tensor] | None = None
        if self.units is not None and (given := self.given_codes(*pad_waveforms(utterances))) is not None:
            sizes = [frame_count(len(samples), self.hop_length) for samples in utterances]
            first = [codes[:size] for codes, size in zip(given, sizes, strict=True)]
            if layers == 1:
                return [codes[None] for codes in first]
        seconds = max(map(len, utterances)) / self.sample_rate
        if len(utterances) == 1 or seconds > CHUNK_S or not isinstance(self.encoder, SEANetEncoder):
            each = itertools.repeat(None) if first is None else first
            return [self._encode(samples, layers, codes) for samples, codes in zip(utterances, each, strict=False)]
        latents = self.encoder.forward_each([samples[None, None] for samples in utterances])
        together = torch.cat(latents, 2)
        z = together if self.latent_norm is None else self.latent_norm(together)
        ids = self.quantizer.encode(z, layers, None if first is None else torch.cat(first))[0]
        return [*ids.split([x.shape[2] for x in latents], 1)]

    def _encode(self, samples: Tensor, layers: int | None, first: Tensor | None) -> Tensor:
        """One utterance float [N] -> its codes long [Q', T]; first: long [T], those of layer 0 if they are given."""
        frames = round(CHUNK_S * self.frame_rate)
        if len(samples) > frames * self.hop_length:
            return in_chunks(ChunkedEncoder(self, layers, first), samples, frames, self.hop_length)
        return self.quantizer.encode(self.latents(samples[None]), layers, first)[0]

    def _decode(self, ids: Tensor) -> Tensor:
        """The codes of one utterance long [Q', T] -> speech float [T * hop]."""
        frames = round(CHUNK_S * self.frame_rate)
        if ids.shape[1] > frames:
            return in_chunks(ChunkedDecoder(self), ids, frames)
        return self.decoder(self.quantizer.decode(ids[None].to(self.codebooks.device)))[0, 0]

    def _check(self, layers: int | None) -> None:
        if self.training:
            raise ValueError("the codec is in training mode: call codec.eval() before encoding")
        require_layers(layers, self.num_codebooks)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md that `save_pretrained` and `push_to_hub` write if there is none yet."""
        bit_rate = self.frame_rate * math.log2(self.codebook_size)  # of one codebook
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return super().generate_model_card(codec=self, bit_rate=bit_rate, parameters=parameters, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.units is not None:
            (save_directory / UNITS).mkdir(exist_ok=True)
            self.units.save_pretrained(save_directory / UNITS)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SpeechCodec":
        """Load from a folder or hub name, in eval mode; FileNotFoundError or InputError if it holds no such codec.

        units: those of the codec, if it has any; `load_tokenizer` finds them in the folder.
        """
        name = check_folder(pretrained_model_name_or_path, ["config.json", "model.safetensors"], "a speech codec")
        config = read_pretrained_json(name, "config.json") if Path(name).is_dir() else {"num_codebooks": None}
        if "model_type" in config or "num_codebooks" not in config:
            raise InputError(f"{name} holds no codec of this package: found {describe(name)}")
        with reading(name, "a codec of this package"), contextlib.redirect_stdout(None):  # the mixin prints the place
            return super().from_pretrained(name, **kwargs).eval()

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        fill_weights(model, read_weights(model_file, "the weights of a speech codec"), model_file)
        return model


def _check_units(config: SpeechCodecConfig, units: DiscreteTokenizer | None) -> None:
    if (config.quantizer == "units") != (units is not None):
        raise InputError(
            "a codec has units, the tokenizer of layer 0, if and only if its quantizer is units: load_tokenizer finds "
            "them in the codec's folder, which of a hub's model has to be downloaded first"
        )
    if units is not None:
        expected = config.sample_rate, config.sample_rate / config.hop_length, config.codebook_size, False
        found = units.sample_rate, units.frame_rate, units.codebook_size, getattr(units, "deduplicate", False)
        if found != expected:
            names = "sample rate, frame rate, codes and whether repeats are merged"
            raise InputError(f"units of layer 0: their {names} must be {expected}, but are {found}")


def _body(config: SpeechCodecConfig) -> tuple[Any, Any]:
    """Encoder and decoder."""
    dimension = config.dimension
    if config.body == "convnext":
        shape = dimension, config.width, config.depth
        rate, hop = config.sample_rate, config.hop_length
        inverse = ConvNeXtDecoder(*shape, hop, config.causal, config.phases)
        return ConvNeXtEncoder(*shape, rate, hop, config.causal), inverse
    style = ConvStyle(config.norm, config.causal, config.pad_mode)
    lstm = "none" if config.lstm == "none" else "forward"
    decoder = SEANetDecoder(dimension, config.n_filters, config.strides, lstm, style)
    if config.front_end == "log_mel":
        return LogMelEncoder(dimension, 16 * config.n_filters, config.sample_rate, style), decoder
    return SEANetEncoder(dimension, config.n_filters, config.strides, config.lstm, style), decoder
