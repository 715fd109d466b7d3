"""SEANet, the convolutional encoder and decoder of SoundStream and EnCodec (paper, section 2.1).

Module names and order follow transformers' EncodecModel, so that published EnCodec weights can be loaded by name.
Shapes: waveform float [B, 1, N], latents float [B, D, T] with T = ceil(N / hop).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tokenizer.codec.batch_norm import BatchNorm1d
from tokenizer.frames import frame_count

KERNEL = 7
RESIDUAL_KERNEL = 3


@dataclass(frozen=True)
class ConvStyle:
    """Settings shared by all convolutions: weight_norm, batch_norm or none; causal or not; reflect or constant."""

    norm: str
    causal: bool
    pad_mode: str


def _normalized(conv: nn.Module, norm: str) -> nn.Module:
    return weight_norm(conv) if norm == "weight_norm" else conv


class Conv1d(nn.Module):
    """Convolution that returns exactly ceil(N / stride) frames, padded on both sides or (causal) on the left only.

    past, ahead: inputs that an output sees before and after its own, here and in the layers below.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, style: ConvStyle, stride: int = 1):
        super().__init__()
        self.conv = _normalized(nn.Conv1d(in_channels, out_channels, kernel, stride), style.norm)
        self.norm = BatchNorm1d(out_channels) if style.norm == "batch_norm" else nn.Identity()
        self.out_channels, self.stride, self.pad_mode = out_channels, stride, style.pad_mode
        self.ahead = 0 if style.causal else (kernel - stride) // 2
        self.past = kernel - stride - self.ahead

    def forward(self, x: Tensor) -> Tensor:
        extra = -x.shape[-1] % self.stride
        return self.norm(self.conv(_pad(x, self.past, self.ahead + extra, self.pad_mode)))


def _pad(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """As F.pad, but reflection also works for signals shorter than the padding, which are first padded with zeros."""
    if mode != "reflect":
        return F.pad(x, (left, right), mode)
    short = max(left, right) - x.shape[-1] + 1
    if short <= 0:
        return F.pad(x, (left, right), "reflect")
    return F.pad(F.pad(x, (0, short)), (left, right), "reflect")[..., :-short]


class ConvTranspose1d(nn.Module):
    """Transposed convolution that returns exactly T * stride samples."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, style: ConvStyle, stride: int):
        super().__init__()
        self.conv = _normalized(nn.ConvTranspose1d(in_channels, out_channels, kernel, stride), style.norm)
        self.norm = BatchNorm1d(out_channels) if style.norm == "batch_norm" else nn.Identity()
        self.out_channels, self.stride = out_channels, stride
        self.left = 0 if style.causal else (kernel - stride + 1) // 2  # samples before the first one returned
        self.past, self.ahead = (kernel - 1 - self.left) // stride, frame_count(self.left, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)[..., self.left : self.left + x.shape[-1] * self.stride])


class LSTM(nn.Module):
    """Two LSTM layers over time with a skip connection, channels first; doubles the channels when bidirectional."""

    def __init__(self, channels: int, bidirectional: bool = False):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, 2, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        return self.advance(x)[0]

    def advance(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output, and the state to pass with the next frames; for the first ones `state` is None."""
        x = x.permute(2, 0, 1)
        out, state = self.lstm(x, state)
        return (out + (x.repeat(1, 1, 2) if self.lstm.bidirectional else x)).permute(1, 2, 0), state

    def forward_each(self, utterances: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of utterances float [1, C, T_i], all in one pass; equal up to rounding."""
        packed = nn.utils.rnn.pack_sequence([x[0].T for x in utterances], enforce_sorted=False)
        out = nn.utils.rnn.unpack_sequence(self.lstm(packed)[0])
        skip = 2 if self.lstm.bidirectional else 1
        return [y.T[None] + x.repeat(1, skip, 1) for x, y in zip(utterances, out, strict=True)]


class ResidualUnit(nn.Module):
    """Two convolutions with half the channels in between, and a 1x1 convolution as shortcut."""

    def __init__(self, channels: int, style: ConvStyle):
        super().__init__()
        conv = Conv1d(channels, channels // 2, RESIDUAL_KERNEL, style)
        self.out_channels, self.past, self.ahead = channels, conv.past, conv.ahead
        self.block = nn.Sequential(nn.ELU(), conv, nn.ELU(), Conv1d(channels // 2, channels, 1, style))
        self.shortcut = Conv1d(channels, channels, 1, style)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class SEANetEncoder(nn.Module):
    """Waveform float [B, 1, N] -> latents float [B, D, ceil(N / hop)], hop = product of the strides."""

    def __init__(self, dimension: int, n_filters: int, strides: tuple[int, ...], lstm: str, style: ConvStyle):
        super().__init__()
        layers: list[nn.Module] = [Conv1d(1, n_filters, KERNEL, style)]
        channels = n_filters
        for stride in strides:
            layers += [ResidualUnit(channels, style), nn.ELU()]
            layers += [Conv1d(channels, 2 * channels, 2 * stride, style, stride)]
            channels *= 2
        if lstm != "none":
            layers.append(LSTM(channels, bidirectional=lstm == "bidirectional"))
            channels *= 2 if lstm == "bidirectional" else 1
        layers += [nn.ELU(), Conv1d(channels, dimension, KERNEL, style)]
        self.layers = nn.Sequential(*layers)

    @property
    def stages(self) -> list[nn.Module]:
        return [*self.layers]

    def forward(self, waveform: Tensor) -> Tensor:
        return self.layers(waveform)

    def forward_each(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of utterances float [1, 1, N_i], equal up to rounding.

        Only the LSTM, whose steps wait for each other, takes all at once: convolutions see where an utterance ends.
        """
        for place, layer in enumerate(self.layers):
            if isinstance(layer, LSTM):
                inner = layer.forward_each([self.layers[:place](waveform) for waveform in waveforms])
                return [self.layers[place + 1 :](x) for x in inner]
        return [self(waveform) for waveform in waveforms]


class SEANetDecoder(nn.Module):
    """Latents float [B, D, T] -> waveform float [B, 1, T * hop]; mirrors the encoder.

    Its LSTM is unidirectional even if the encoder's is bidirectional (as in SpeechTokenizer).
    """

    def __init__(self, dimension: int, n_filters: int, strides: tuple[int, ...], lstm: str, style: ConvStyle):
        super().__init__()
        channels = n_filters * 2 ** len(strides)
        layers: list[nn.Module] = [Conv1d(dimension, channels, KERNEL, style)]
        if lstm != "none":
            layers.append(LSTM(channels))
        for stride in reversed(strides):
            layers += [nn.ELU(), ConvTranspose1d(channels, channels // 2, 2 * stride, style, stride)]
            channels //= 2
            layers.append(ResidualUnit(channels, style))
        # batch normalisation would remove the waveform's level
        last = replace(style, norm="none") if style.norm == "batch_norm" else style
        layers += [nn.ELU(), Conv1d(channels, 1, KERNEL, last)]
        self.layers = nn.Sequential(*layers)

    @property
    def stages(self) -> list[nn.Module]:
        return [*self.layers]

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)
