"""A log-mel front end for the codec's encoder, trained on minutes of speech where SEANet needs hours (on two CPUs).

Selected by `front_end: log_mel` in `SpeechCodecConfig`; the rest of the codec stays the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from tokenizer.codec.batch_norm import BatchNorm1d
from tokenizer.codec.seanet import RESIDUAL_KERNEL, Conv1d, ConvStyle
from tokenizer.rates import HOP_LENGTH

MEL_HOP = HOP_LENGTH // 2  # samples: two mel frames per codec frame
WINDOW = 400  # samples, 25 ms at 16 kHz
N_FFT = 1024  # zero-padded, so that no mel filter is empty
BANDS = 80


class LogMel(nn.Module):
    """Waveform float [B, N] -> log-mel float [B, 80, 2 ceil(N / 320)], two frames for every one of a codec.

    Each is centred on its 160 samples; samples after the end are zeros.
    """

    margin = (N_FFT - MEL_HOP) // 2  # samples that a frame sees on each side of its own

    filters: Tensor
    window: Tensor

    def __init__(self, sample_rate: int = 16_000):
        super().__init__()
        filters = melscale_fbanks(N_FFT // 2 + 1, 0.0, sample_rate / 2, BANDS, sample_rate)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        with torch.autocast(waveform.device.type, enabled=False):
            padded = F.pad(waveform.float(), (self.margin, self.margin - waveform.shape[-1] % -HOP_LENGTH))
            spectrum = torch.stft(padded, N_FFT, MEL_HOP, WINDOW, self.window, center=False, return_complex=True)
            power = torch.view_as_real(spectrum).square().sum(-1)
            return torch.log(self.filters.T @ power + 1e-5)


class LogMelEncoder(nn.Module):
    """Waveform float [B, 1, N] -> latents float [B, D, ceil(N / 320)] by log-mel frames and convolutions."""

    def __init__(self, dimension: int, channels: int, sample_rate: int, style: ConvStyle):
        super().__init__()
        self.log_mel = LogMel(sample_rate)
        self.input_norm = BatchNorm1d(BANDS)
        self.layers = nn.Sequential(
            Conv1d(BANDS, channels, 5, style),
            nn.ELU(),
            Conv1d(channels, channels, 4, style, stride=2),
            *(Residual(channels, style) for _ in range(3)),
            nn.ELU(),
            Conv1d(channels, dimension, 3, style),
        )

    @property
    def stages(self) -> list[nn.Module]:
        return [self.log_mel, self.input_norm, *self.layers]

    def forward(self, waveform: Tensor) -> Tensor:
        return self.layers(self.input_norm(self.log_mel(waveform.squeeze(1))))


class Residual(nn.Module):
    """Two convolutions, of kernels 3 and 1, with a skip connection."""

    def __init__(self, channels: int, style: ConvStyle):
        super().__init__()
        conv = Conv1d(channels, channels, RESIDUAL_KERNEL, style)
        self.out_channels, self.past, self.ahead = channels, conv.past, conv.ahead
        self.block = nn.Sequential(nn.ELU(), conv, nn.ELU(), Conv1d(channels, channels, 1, style))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)
