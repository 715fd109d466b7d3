"""Codes of an encoder's frames that are learnt by giving the frames back: RepCodec (Huang et al., arXiv 2309.00169).

K-means (`UnitTokenizer`) places each frame by itself. Here a network before the codebooks and one behind them see the
frames around it as well, and learn, with the codebooks, to reconstruct the frames; what a code leaves unsaid can so be
said by its neighbours.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from tokenizer.codec.convnext import ConvNeXtBlock
from tokenizer.codec.quantizer import ResidualVectorQuantizer
from tokenizer.errors import InputError
from tokenizer.frames import frame_mask
from tokenizer.interface import AudioTokenizer, Codes, FeatureTokenizer, require_layers
from tokenizer.pretrained import module_fingerprint
from tokenizer.schemes.recoder import Recoder

GAIN = 0.1  # of what a block adds, at first: the network begins close to k-means


class FrameAutoencoder(nn.Module):
    """Frames float [B, T, C] -> latents float [B, C, T] -> codes long [B, Q, T] -> frames.

    Frames are centred and scaled (`begin`), so that the mean squared error of reconstructed ones is the share of their
    variance that is lost. lengths: long [B] in frames; what follows them is padding, and not seen.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, depth: int, num_codebooks: int, codebook_size: int):
        super().__init__()
        self.before = nn.ModuleList(ConvNeXtBlock(width, GAIN, causal=False) for _ in range(depth))
        self.behind = nn.ModuleList(ConvNeXtBlock(width, GAIN, causal=False) for _ in range(depth))
        self.quantizer = ResidualVectorQuantizer(width, num_codebooks, codebook_size)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def begin(self, frames: Tensor, seed: int = 0, main: bool = True) -> None:
        """Centre and scale by these frames, float [M, C], and begin the codebooks by k-means on their latents.

        The frames are taken as one utterance. All processes call this, and take the codebooks of the first, which is
        the `main` one. Raises ValueError for fewer than 20 frames a code.
        """
        self.mean.copy_(frames.mean(0))
        self.scale.copy_((frames - self.mean).square().mean().sqrt().clamp(min=1e-6))
        lengths = torch.tensor([len(frames)], device=frames.device)
        self.quantizer.initialize(self.latents(frames[None], lengths)[0].T if main else None, seed)

    def latents(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Frames float [B, T, C] -> what the codebooks quantise, float [B, C, T]."""
        return _through(self.before, ((frames - self.mean) / self.scale).transpose(1, 2), lengths)

    def frames(self, latents: Tensor, lengths: Tensor) -> Tensor:
        """Quantised latents float [B, C, T] -> frames float [B, T, C]."""
        return _through(self.behind, latents, lengths).transpose(1, 2) * self.scale + self.mean

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The share of the variance that is lost by all codebooks, and the commitment, scalars; trains the codebooks.

        Of a batch without a frame both are 0.
        """
        inside = frame_mask(lengths, frames.shape[1], hop_length=1)
        quantized = self.quantizer(self.latents(frames, lengths), inside)
        errors = ((self.frames(quantized.output, lengths) - frames) / self.scale).square().mean(2)
        return (errors * inside).sum() / inside.sum().clamp(min=1), quantized.commitment


def _through(blocks: nn.ModuleList, x: Tensor, lengths: Tensor) -> Tensor:
    """x float [B, C, T] through the blocks; padding is zero before each of them, as what lies beyond an end."""
    inside = frame_mask(lengths, x.shape[2], hop_length=1)[:, None]
    for block in blocks:
        x = block(x * inside)
    return x * inside


class RepCodec(Recoder):
    """A `DiscreteTokenizer` of the frames of another tokenizer: one code a frame and codebook."""

    kind = "repcodec"
    network: FrameAutoencoder

    def __init__(self, base: AudioTokenizer, depth: int = 2, num_codebooks: int = 1, codebook_size: int = 1024):
        """base: whose frames are coded; depth: blocks on either side of the codebooks."""
        super().__init__()
        if not isinstance(base, FeatureTokenizer):
            raise InputError(
                f"a RepCodec codes frames, which {type(base).__name__} does not return: give features:NAME as codec"
            )
        self.base = base
        self.shape = {"depth": depth, "num_codebooks": num_codebooks, "codebook_size": codebook_size}
        self.network = FrameAutoencoder(base.width, **self.shape)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], base: AudioTokenizer) -> Self:
        return cls(base, settings["depth"], settings["num_codebooks"], settings["codebook_size"])

    def settings(self) -> dict[str, Any]:
        return self.shape

    @property
    def deduplicate(self) -> bool:
        """Whether the frames have no time, as those of a compressor."""
        return getattr(self.base, "deduplicate", False)

    @property
    def num_codebooks(self) -> int:
        return self.shape["num_codebooks"]

    @property
    def codebook_size(self) -> int:
        return self.shape["codebook_size"]

    @property
    def codebooks(self) -> Tensor:
        """Code vectors, float [Q, K, C]."""
        return self.network.quantizer.codebooks

    @property
    def fingerprint(self) -> str:
        """Hash of base and weights, whose shapes tell the rest."""
        return module_fingerprint(self.network, {"base": self.base.fingerprint})

    def encode(self, waveform: Tensor, lengths: Tensor | None = None, layers: int | None = None) -> Codes:
        """Waveforms float [B, N] -> codes long [B, layers, T], one a frame of the base and codebook."""
        require_layers(layers, self.num_codebooks)
        encoded: Any = self.base.encode(waveform, lengths)
        return Codes.from_utterances(self._recode_each(encoded, layers=layers))

    @torch.no_grad()
    def recode(self, speech: Tensor, layers: int | None = None) -> Tensor:
        """One utterance as the base encodes it, features [T, C] of any precision -> codes long [Q, T], on the CPU."""
        frames = speech.float().to(self.device)[None]
        latents = self.network.latents(frames, torch.tensor([frames.shape[1]], device=self.device))
        return self.network.quantizer.encode(latents, layers)[0].cpu()

    @torch.no_grad()
    def reconstruct(self, codes: Tensor) -> Tensor:
        """The frames that codes long [Q', T] of the first codebooks stand for, float [T, C], on the CPU."""
        latents = self.network.quantizer.decode(codes.to(self.device)[None])
        return self.network.frames(latents, torch.tensor([codes.shape[1]], device=self.device))[0].cpu()
