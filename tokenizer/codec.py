"""The speech codec: encoder, residual vector quantiser, decoder (paper, eqs. 1 to 3)."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from tokenizer.common import split_utterances
from tokenizer.interface import Codes
from tokenizer.logmel import LogMelEncoder
from tokenizer.model_card import CODEC_CARD
from tokenizer.quantizer import ResidualVectorQuantizer
from tokenizer.seanet import ConvStyle, SEANetDecoder, SEANetEncoder, hop_length
from tokenizer.streaming import StreamingDecoder, StreamingEncoder, in_chunks

CHUNK_S = 10.0  # longer utterances go through a causal codec in chunks of this length: hours fit into memory


@dataclass
class SpeechCodecConfig:
    """Shape of a codec; the defaults are the paper's: 16 kHz, hop 320 (50 frames/s), 8 codebooks of 1024.

    Raises ValueError, naming every problem at once.
    """

    sample_rate: int = 16_000  # Hz
    front_end: Literal["seanet", "log_mel"] = "seanet"  # log_mel: a cheaper encoder for small runs
    dimension: int = 128  # D, width of the latents and the codebooks (EnCodec 128, SpeechTokenizer 1024)
    n_filters: int = 32  # width of the first layer (EnCodec 32, SpeechTokenizer 64)
    strides: tuple[int, ...] = (2, 4, 5, 8)  # in the encoder's order; their product is the hop in samples
    lstm: Literal["none", "forward", "bidirectional"] = "forward"  # of the encoder
    causal: bool = False
    norm: Literal["weight_norm", "batch_norm"] = "weight_norm"  # batch_norm also standardises the latents
    pad_mode: Literal["reflect", "constant"] = "reflect"
    num_codebooks: int = 8  # Q
    codebook_size: int = 1024  # K

    def __post_init__(self) -> None:
        self.strides = tuple(self.strides)
        problems = [
            f"{name} must be positive, got {getattr(self, name)}"
            for name in ("sample_rate", "dimension", "n_filters", "num_codebooks", "codebook_size")
            if getattr(self, name) <= 0
        ]
        for name, hint in get_type_hints(type(self)).items():
            if (choices := get_args(hint)) and get_origin(hint) is Literal and getattr(self, name) not in choices:
                problems.append(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.codebook_size > 65_536:
            problems.append(f"codebook_size is at most 65536 (codes are stored as uint16), got {self.codebook_size}")
        if self.front_end == "log_mel" and (self.causal or hop_length(self.strides) != 320):
            problems.append("front_end log_mel needs causal: false and strides with a product of 320")
        if self.causal and self.lstm == "bidirectional":
            problems.append("a causal codec cannot have a bidirectional lstm: choose forward or none")
        if problems:
            raise ValueError("SpeechCodecConfig: " + "; ".join(problems))


class SpeechCodec(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="speechllm",
    tags=["audio", "speech", "codec"],
    model_card_template=CODEC_CARD,
):
    """Speech to codes at a fixed frame rate, and back.

    >>> codec = SpeechCodec(SpeechCodecConfig(n_filters=4, dimension=16, codebook_size=32)).eval()
    >>> codes = codec.encode(torch.zeros(1, 16_000))
    >>> codes.ids.shape, codec.decode(codes).shape
    (torch.Size([1, 8, 50]), torch.Size([1, 16000]))
    """

    def __init__(self, config: SpeechCodecConfig):
        super().__init__()
        self.config = config
        style = ConvStyle(config.norm, config.causal, config.pad_mode)
        if config.front_end == "seanet":
            self.encoder: nn.Module = SEANetEncoder(
                config.dimension, config.n_filters, config.strides, config.lstm, style
            )
        else:
            self.encoder = LogMelEncoder(config.dimension, 16 * config.n_filters, config.sample_rate, style)
        # without it a small, briefly trained encoder gives a constant plus a little signal, and k-means finds
        # a handful of codes; a fixed scale also makes loss weights mean the same from run to run
        self.latent_norm = nn.BatchNorm1d(config.dimension, affine=False) if config.norm == "batch_norm" else None
        self.quantizer = ResidualVectorQuantizer(config.dimension, config.num_codebooks, config.codebook_size)
        decoder_lstm = "none" if config.lstm == "none" else "forward"
        self.decoder = SEANetDecoder(config.dimension, config.n_filters, config.strides, decoder_lstm, style)

    @property
    def device(self) -> torch.device:
        return self.codebooks.device

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return hop_length(self.config.strides)

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
        """Identity of the configuration and every weight: see `module_fingerprint`."""
        return module_fingerprint(self, asdict(self.config))

    def latents(self, waveform: Tensor) -> Tensor:
        """z0 of eq. 1: waveform float [B, N] -> float [B, D, T], T = ceil(N / hop)."""
        z = self.encoder(waveform[:, None])
        return z if self.latent_norm is None else self.latent_norm(z)

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor | None = None, layers: int | None = None) -> Codes:
        """Waveforms float [B, N] -> codes, T = ceil(n / hop) frames for an utterance of n samples.

        Each utterance runs through the encoder by itself, so on one machine and with one number of threads its codes
        are exactly the same in any batch, and no work is done for padding. Where these differ, and in a stream, the
        latents are equal up to rounding, and so are the codes of frames that do not lie between two codes within it.
        Only the first `layers` codebooks are searched (all when None): their codes are those of all layers.
        Raises ValueError for another shape, non-finite samples, or a codec in training mode.
        """
        self._check(layers)
        utterances = split_utterances(waveform, lengths)
        codes = [self._encode(samples, layers) for samples in utterances]
        return Codes.from_utterances(codes, samples=torch.tensor([len(samples) for samples in utterances]))

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """Codes with Q' <= Q layers -> waveforms float [B, N].

        N is the longest of `codes.samples`, or the longest number of frames times the hop; zeros behind the shorter.
        Each utterance is decoded by itself, too.
        """
        samples = codes.samples if codes.samples is not None else codes.lengths * self.hop_length
        waveform = self.codebooks.new_zeros(len(codes), int(samples.max()))
        for index, length in enumerate(samples.tolist()):
            waveform[index, :length] = self._decode(codes.utterance(index))[:length]
        return waveform

    def _encode(self, samples: Tensor, layers: int | None) -> Tensor:
        """One utterance float [N] -> its codes long [Q', T]."""
        frames = round(CHUNK_S * self.frame_rate)
        if self.config.causal and len(samples) > frames * self.hop_length:
            return in_chunks(StreamingEncoder(self, layers), samples, frames, self.hop_length)
        return self.quantizer.encode(self.latents(samples[None]), layers)[0]

    def _decode(self, ids: Tensor) -> Tensor:
        """The codes of one utterance long [Q', T] -> speech float [T * hop]."""
        frames = round(CHUNK_S * self.frame_rate)
        if self.config.causal and ids.shape[1] > frames:
            return in_chunks(StreamingDecoder(self), ids, frames)
        return self.decoder(self.quantizer.decode(ids[None].to(self.codebooks.device)))[0, 0]

    def _check(self, layers: int | None) -> None:
        if self.training:
            raise ValueError("the codec is in training mode: call codec.eval() before encoding")
        if layers is not None and not 1 <= layers <= self.num_codebooks:
            raise ValueError(f"layers must be 1..{self.num_codebooks}, got {layers}")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md that `save_pretrained` and `push_to_hub` write, where there is none yet."""
        bit_rate = self.frame_rate * math.log2(self.codebook_size)  # of one codebook
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return super().generate_model_card(codec=self, bit_rate=bit_rate, parameters=parameters, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SpeechCodec":
        """Load from a folder or a hub name, in eval mode. Raises FileNotFoundError or ValueError with the remedy."""
        check_folder(pretrained_model_name_or_path, ["config.json", "model.safetensors"], "a speech codec")
        try:
            with contextlib.redirect_stdout(None):  # the mixin prints where it loads from
                codec = super().from_pretrained(pretrained_model_name_or_path, strict=True, **kwargs)
        except (RuntimeError, TypeError, KeyError) as error:
            raise ValueError(f"{pretrained_model_name_or_path} holds no codec of this package: {error}") from error
        return codec.eval()


def module_fingerprint(module: nn.Module, settings: dict[str, Any]) -> str:
    """SHA-256 over the settings (JSON) and every weight of a module, 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_folder(name: str | Path, files: Iterable[str], what: str) -> None:
    """Raise FileNotFoundError where `name` is plainly meant as a folder but lacks the files of `what`.

    Hub libraries answer a mistyped path with a message about repository ids, twenty seconds later without a network.
    """
    folder = Path(name)
    if folder.is_dir():
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} is not the folder of {what}: it lacks {', '.join(missing)}")
    elif str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"{folder}: no such folder (expected one of {what}, or a hub name like owner/model)")
