"""A codec body that works at the frame rate: spectra in, ConvNeXt blocks and local attention, spectra out.

SEANet computes mostly on samples, and two cores train it for hours before it speaks. Here the convolutions see 50
frames a second: the encoder starts from log-mel spectra, and the decoder ends with an inverse short-time Fourier
transform, as in Vocos (arXiv 2306.00814) and WavTokenizer (arXiv 2408.16532). Attention over nearby frames takes the
place of SEANet's LSTM.
Every layer sees a bounded number of frames before its own (`past`) and, unless it is causal, after it (`ahead`): so
hours are encoded in chunks, and a causal body works on a stream (`tokenizer.codec.streaming`).
Shapes as in SEANet: waveform float [B, 1, N], latents float [B, D, T] with T = ceil(N / hop).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

SPECTRA = ((1024, 100, 1), (512, 80, 2))  # window in samples, mel bands, spectra per frame
KERNEL = 7
HEAD_WIDTH = 64  # channels of an attention head
REACH = 25  # frames that attention sees on each side: half a second
SUBFRAMES = 2  # spectra per frame that the decoder predicts
LOUDEST = 200.0  # magnitude of a bin, above which the head does not go (before it is sharpened)
QUIETEST = 1e-3  # magnitude that is added to those of a recording before their logarithm is taken
GRIFFIN_LIM = 24  # iterations
MOMENTUM = 0.5
SHARPNESS = 1.1  # power to which they raise the magnitudes: more sounds clearer, and is further from them


Layer = Callable[[Tensor], Tensor]


class LogMelSpectra(nn.Module):
    """Waveform float [B, 1, N] -> log-mel spectra of several resolutions, float [B, C, ceil(N / hop)].

    Windows are centred on their part of the frame, or end with it if causal. Samples beyond the ends are zeros.
    """

    def __init__(self, sample_rate: int, hop_length: int, causal: bool):
        super().__init__()
        self.hop_length, self.causal = hop_length, causal
        self.channels = sum(bands * count for _, bands, count in SPECTRA)
        margins = [self._margins(size, count) for size, _, count in SPECTRA]
        self.past, self.ahead = (max(0, *sides) for sides in zip(*margins, strict=True))  # samples beside the frame
        for i, (window, bands, _) in enumerate(SPECTRA):
            filters = melscale_fbanks(window + 1, 0.0, sample_rate / 2, bands, sample_rate)  # of twice as many points
            self.register_buffer(f"filters_{i}", filters.T.contiguous(), persistent=False)
            self.register_buffer(f"window_{i}", torch.hann_window(window), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        waveform = F.pad(waveform.squeeze(1), (0, -waveform.shape[-1] % self.hop_length))
        with torch.autocast(waveform.device.type, enabled=False):
            return torch.cat([self._spectra(waveform, i, *SPECTRA[i]) for i in range(len(SPECTRA))], 1)

    def _margins(self, size: int, count: int) -> tuple[int, int]:
        """Samples that a window sees before and after its own part of the frame."""
        total = size - self.hop_length // count
        right = 0 if self.causal else total // 2
        return total - right, right

    def _spectra(self, waveform: Tensor, i: int, size: int, bands: int, count: int) -> Tensor:
        window = getattr(self, f"window_{i}")
        frames = F.pad(waveform.to(window), self._margins(size, count)).unfold(1, size, self.hop_length // count)
        power = torch.fft.rfft(frames * window, 2 * size).abs().square()
        mel = torch.log(power @ getattr(self, f"filters_{i}").T + 1e-4) / 4 + 1  # of speech mostly from -1 to 2
        return mel.unflatten(1, (-1, count)).flatten(2).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time and two linear layers over channels, with a skip connection: [B, C, T] -> same.

    ConvNeXt (arXiv 2201.03545) in one dimension; `scale` is the initial factor of what the block adds.
    """

    def __init__(self, channels: int, scale: float, causal: bool):
        super().__init__()
        self.channels = channels
        self.past, self.ahead = (KERNEL - 1, 0) if causal else (KERNEL // 2, KERNEL // 2)
        self.depthwise = nn.Conv1d(channels, channels, KERNEL, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 3 * channels)
        self.shrink = nn.Linear(3 * channels, channels)
        self.gain = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(F.pad(x, (self.past, self.ahead))).transpose(1, 2))
        return x + (self.gain * self.shrink(F.gelu(self.expand(y)))).transpose(1, 2)


class LocalAttention(nn.Module):
    """Self-attention over REACH frames on each side (of the past only if causal), with a skip connection.

    Positions are relative (rotary), so that a frame depends on its surroundings and not on its place.
    """

    def __init__(self, channels: int, scale: float, causal: bool):
        super().__init__()
        self.channels, self.heads = channels, max(1, channels // HEAD_WIDTH)
        self.past, self.ahead = REACH, 0 if causal else REACH
        self.norm = nn.LayerNorm(channels)
        self.input = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        self.gain = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[2], device=x.device)
        distance = places[:, None] - places
        seen = (distance <= self.past) & (distance >= -self.ahead)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.input(self.norm(x.transpose(1, 2))).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(rotate(query, places), rotate(key, places), value, attn_mask=seen)
        return x + (self.gain * self.output(y.transpose(1, 2).flatten(2))).transpose(1, 2)


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): x float [..., T, C] with C even, places long [T].

    The angles are in float64: in float32, those of the thousandth frame are off by 1e-4, which is its own.
    """
    pairs = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float64)
    rates = torch.exp(pairs * (-math.log(1000.0) / x.shape[-1]))
    angles = places[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x.chunk(2, -1)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)


def frame_blocks(channels: int, depth: int, causal: bool) -> nn.Sequential:
    """`depth` ConvNeXt blocks with attention after each third of them, float [B, C, T] -> the same shape."""
    scale, third = 1 / depth, max(1, depth // 3)
    layers: list[nn.Module] = []
    for block in range(1, depth + 1):
        layers.append(ConvNeXtBlock(channels, scale, causal))
        if block % third == 0 and block < depth:
            layers.append(LocalAttention(channels, scale, causal))
    return nn.Sequential(*layers)


def _initialize(module: nn.Module) -> None:
    """Small weights, as Vocos has them."""
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConvNeXtEncoder(nn.Module):
    """Waveform float [B, 1, N] -> latents float [B, D, ceil(N / hop)].

    Nothing but the blocks' own branches is not linear in the spectra, so that a training can begin with a good linear
    code of them (`tokenizer.training.initialization`).
    """

    def __init__(self, dimension: int, width: int, depth: int, sample_rate: int, hop_length: int, causal: bool):
        super().__init__()
        self.spectra = LogMelSpectra(sample_rate, hop_length, causal)
        self.input = nn.Conv1d(self.spectra.channels, width, 1)
        self.blocks = frame_blocks(width, depth, causal)
        self.output = nn.Conv1d(width, dimension, 1)
        self.apply(_initialize)

    @property
    def stages(self) -> list[Layer]:
        return [self.spectra, self.input, *self.blocks, self.output]

    def forward(self, waveform: Tensor) -> Tensor:
        return _chain(self.stages, waveform)


def _chain(layers: list[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class Neighbours(nn.Conv1d):
    """A convolution over a frame and those beside it, before it if causal: float [B, C, T] -> [B, C', T]."""

    def __init__(self, channels: int, out_channels: int, causal: bool):
        super().__init__(channels, out_channels, 3)
        self.past, self.ahead = (2, 0) if causal else (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.past, self.ahead)))

    def windows(self, x: Tensor) -> Tensor:
        """What the weights [C', C, 3] are for: x float [B, C, T] -> float [B, C, 3, T]."""
        return F.pad(x, (self.past, self.ahead)).unfold(2, 3, 1).transpose(2, 3)


class ConvNeXtDecoder(nn.Module):
    """Latents float [B, D, T] -> waveform float [B, 1, T * hop]; linear up to the head, but for the blocks."""

    def __init__(self, dimension: int, width: int, depth: int, hop_length: int, causal: bool, phases: str):
        super().__init__()
        self.input = Neighbours(dimension, width, causal)
        self.blocks = frame_blocks(width, depth, causal)
        self.inverse = GriffinLim(hop_length) if phases == "griffin_lim" else InverseSTFT(hop_length, causal)
        self.output = nn.Conv1d(width, self.inverse.channels, 1)
        self.apply(_initialize)

    @property
    def stages(self) -> list[Layer]:
        return [self.input, *self.blocks, self.output, self.inverse]

    def forward(self, z: Tensor, original: Tensor | None = None) -> Tensor:
        """original: waveform float [B, N], if it is known, whose phases the magnitudes get if none are predicted.

        So a loss of the waveform is one of the magnitudes, and need not pass through Griffin and Lim's iterations.
        """
        if original is None:
            return _chain(self.stages, z)
        return self.inverse.with_phases_of(original, _chain(self.stages[:-1], z))


class InverseSTFT(nn.Module):
    """Spectra float [B, C, T], levels and phases of SUBFRAMES windows per frame -> waveform float [B, 1, T * hop].

    A window has four steps, of which a frame has SUBFRAMES. It is centred on its step, so that the waveform waits for
    one more frame. If causal, it begins with its step, so that the samples of a frame depend on no later one. Such a
    window rises within the step and falls over the next three, as in codecs of low delay: under a symmetric one most of
    a sample would come from spectra predicted a frame before it.
    """

    window: Tensor

    def __init__(self, hop_length: int, causal: bool):
        super().__init__()
        self.step = hop_length // SUBFRAMES
        self.bins = 2 * self.step + 1
        self.channels = SUBFRAMES * 2 * self.bins
        self.first = 0 if causal else 3 * self.step // 2  # sample of the first window at which the waveform begins
        self.past, self.ahead = (2, 0) if causal else (1, 1)  # frames
        rise, fall = (self.step, 3 * self.step) if causal else (2 * self.step, 2 * self.step)
        window = torch.cat([torch.hann_window(2 * rise)[:rise], torch.hann_window(2 * fall)[fall:]])
        self.register_buffer("window", window, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        level, phase = self.of_windows(x).chunk(2, -1)
        return self.overlap(torch.polar(_magnitudes(level), phase))[:, None]

    def of_windows(self, x: Tensor) -> Tensor:
        """Channels of frames float [B, SUBFRAMES * n, T] -> of windows float [B, M = T * SUBFRAMES, n]."""
        return x.transpose(1, 2).unflatten(2, (SUBFRAMES, -1)).flatten(1, 2)

    def with_phases_of(self, original: Tensor, x: Tensor) -> Tensor:
        """As `forward`; a head that predicts no phases takes those of the waveform `original` float [B, N].

        With these there is nothing to be sharpened against: the magnitudes are learnt as they are.
        """
        return self(x)

    @property
    def level_channels(self) -> Tensor:
        """Which of the channels are levels, long [SUBFRAMES * bins]."""
        return torch.arange(self.channels).view(SUBFRAMES, -1)[:, : self.bins].flatten()

    def spectra(self, waveform: Tensor) -> Tensor:
        """Complex spectra [B, M, bins] of a waveform float [B, N], of which `overlap` gives its whole frames back."""
        size = len(self.window)
        rest = -waveform.shape[1] % (SUBFRAMES * self.step)  # of the last frame, zeros
        padded = F.pad(waveform, (self.first, size - self.step - self.first + rest))
        return torch.fft.rfft(padded.unfold(1, size, self.step) * self.window)

    def levels(self, waveform: Tensor) -> Tensor:
        """What `level_channels` would have to be for a waveform float [B, N]: float [B, SUBFRAMES * bins, T]."""
        levels = torch.log(self.spectra(waveform).abs() + QUIETEST)
        return levels.unflatten(1, (-1, SUBFRAMES)).flatten(2).transpose(1, 2)

    def overlap(self, spectra: Tensor) -> Tensor:
        """Overlapping windows of complex spectra [B, M, bins] -> samples float [B, M * step]."""
        size = len(self.window)
        frames = torch.fft.irfft(spectra, size) * self.window
        weights = self.window.square().expand(1, frames.shape[1], size)
        # where few windows overlap, at an end of the utterance, the samples fade instead of being blown up
        samples = self._add(frames) / self._add(weights).clamp(min=0.1)
        return samples[:, self.first : self.first + frames.shape[1] * self.step]

    def _add(self, frames: Tensor) -> Tensor:
        """Windows float [B, M, size] added at their places, float [B, (M - 1) * step + size]."""
        count, size = frames.shape[1:]
        shape = {"output_size": (1, (count - 1) * self.step + size), "kernel_size": (1, size), "stride": (1, self.step)}
        return F.fold(frames.transpose(1, 2), **shape)[:, 0, 0]


class GriffinLim(InverseSTFT):
    """Levels float [B, C, T] of SUBFRAMES windows per frame -> waveform float [B, 1, T * hop].

    The phases are those that fit the levels: from phases of zero, each iteration takes the phases of the waveform that
    the last ones give (Griffin and Lim 1984), with momentum (Perraudin et al. 2013). Overlapping windows tell most of
    them, and a network needs long to learn them. An iteration reaches three windows further.
    Of predicted levels no waveform has quite the spectra, and what there is fills the valleys between harmonics and
    formants. So the magnitudes are sharpened first, as in Tacotron (arXiv 1703.10135, section 3.4).
    """

    def __init__(self, hop_length: int):
        super().__init__(hop_length, causal=False)
        self.channels = SUBFRAMES * self.bins
        self.past = self.ahead = math.ceil(3 * (GRIFFIN_LIM + 1) / SUBFRAMES)

    def forward(self, x: Tensor) -> Tensor:
        magnitudes = _sharpened(_magnitudes(self.of_windows(x)))
        spectra = torch.complex(magnitudes, torch.zeros_like(magnitudes))
        previous = torch.zeros_like(spectra)
        for _ in range(GRIFFIN_LIM):
            found = self.spectra(self.overlap(spectra))
            spectra = torch.polar(magnitudes, (found - MOMENTUM * previous).angle())
            previous = found
        return self.overlap(spectra)[:, None]

    def with_phases_of(self, original: Tensor, x: Tensor) -> Tensor:
        phases = self.spectra(original).angle()
        return self.overlap(torch.polar(_magnitudes(self.of_windows(x)), phases))[:, None]


def _magnitudes(levels: Tensor) -> Tensor:
    return levels.exp().clamp(max=LOUDEST)


def _sharpened(magnitudes: Tensor) -> Tensor:
    """Magnitudes float [..., bins] to the power SHARPNESS, each window as loud as it was."""
    sharp = magnitudes.pow(SHARPNESS)
    return sharp * (magnitudes.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True).clamp(min=1e-12))
