"""Discriminators, networks that distinguish speech from its reconstruction, and the adversarial losses (eqs. 6, 7).

The multi-scale STFT discriminator is EnCodec's (arXiv 2210.13438), the other two are HiFi-GAN's (arXiv 2010.05646).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchaudio.transforms import Spectrogram

from tokenizer.errors import InputError
from tokenizer.training.distributed import average_gradients

Kind = Literal["hinge", "least_squares"]


@dataclass(frozen=True)
class DiscriminatorOutput:
    """Output of one network for a batch: scores float [B, ...], high for real speech, and its hidden activations."""

    scores: Tensor
    features: list[Tensor]


class _SubDiscriminator(nn.Module):
    """Weight-normalised convolutions with leaky ReLUs in between; the last one returns scores on one channel."""

    def __init__(self, convolutions: Sequence[nn.Module], slope: float):
        super().__init__()
        self.convolutions = nn.ModuleList(weight_norm(convolution) for convolution in convolutions)
        self.slope = slope

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        *hidden, last = self.convolutions
        features = []
        for convolution in hidden:
            x = F.leaky_relu(convolution(x), self.slope)
            features.append(x)
        return DiscriminatorOutput(last(x)[:, 0].float(), features)


class MultiScaleSTFTDiscriminator(nn.Module):
    """Processes complex spectrograms with several window sizes, each by its own network (EnCodec, section 3.4).

    Real and imaginary parts are two channels over time and frequency; the hop is a quarter of the window. The edges of
    the waveform are mirrored. Waveform float [B, N] -> one output per window. Raises InputError unless N exceeds half
    the largest window.
    """

    def __init__(self, filters: int = 32, windows: tuple[int, ...] = (1024, 2048, 512, 256, 128)):
        super().__init__()
        self.shortest = max(windows) // 2 + 1
        self.stfts = nn.ModuleList(
            Spectrogram(window, hop_length=window // 4, power=None, normalized=True) for window in windows
        )
        self.networks = nn.ModuleList(_SubDiscriminator(self._convolutions(filters), slope=0.2) for _ in windows)

    @staticmethod
    def _convolutions(filters: int) -> list[nn.Module]:
        dilated = [nn.Conv2d(filters, filters, (3, 9), (1, 2), (d, 4), dilation=(d, 1)) for d in (1, 2, 4)]
        return [
            nn.Conv2d(2, filters, (3, 9), padding=(1, 4)),
            *dilated,
            nn.Conv2d(filters, filters, 3, padding=1),
            nn.Conv2d(filters, 1, 3, padding=1),
        ]

    def forward(self, waveform: Tensor) -> list[DiscriminatorOutput]:
        if waveform.shape[1] < self.shortest:
            raise InputError(
                f"waveforms of {waveform.shape[1]} samples are too short for the STFT discriminator: decode at least "
                f"{self.shortest} samples or choose smaller windows"
            )
        with torch.autocast(waveform.device.type, enabled=False):
            spectra = [torch.view_as_real(stft(waveform.float())) for stft in self.stfts]  # [B, frequency, time, 2]
        return [network(x.permute(0, 3, 2, 1)) for network, x in zip(self.networks, spectra, strict=True)]


class MultiPeriodDiscriminator(nn.Module):
    """Processes every p-th sample, for several periods p: the waveform folded to [N / p, p] (HiFi-GAN, section 2.3).

    Waveform float [B, N] -> one output per period. N must be at least the largest period.
    """

    def __init__(self, channels: int = 32, periods: tuple[int, ...] = (2, 3, 5, 7, 11)):
        super().__init__()
        self.periods = periods
        self.networks = nn.ModuleList(_SubDiscriminator(self._convolutions(channels), slope=0.1) for _ in periods)

    @staticmethod
    def _convolutions(channels: int) -> list[nn.Module]:
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels]
        return [
            *(nn.Conv2d(narrow, wide, (5, 1), (3, 1), (2, 0)) for narrow, wide in pairwise(widths)),
            nn.Conv2d(widths[-1], widths[-1], (5, 1), padding=(2, 0)),
            nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)),
        ]

    def forward(self, waveform: Tensor) -> list[DiscriminatorOutput]:
        outputs = []
        for network, period in zip(self.networks, self.periods, strict=True):
            padded = F.pad(waveform, (0, -waveform.shape[1] % period), "reflect")
            outputs.append(network(padded.unflatten(1, (-1, period))[:, None]))
        return outputs


class MultiScaleDiscriminator(nn.Module):
    """Processes the waveform at several sample rates, each half the previous one (MelGAN, HiFi-GAN section 2.3).

    Waveform float [B, N] -> one output per scale. `channels` is a multiple of 16, the number of convolution groups.
    All scales use weight normalisation, as in MelGAN; HiFi-GAN uses spectral normalisation at the first.
    """

    def __init__(self, channels: int = 128, scales: int = 3):
        super().__init__()
        self.networks = nn.ModuleList(_SubDiscriminator(self._convolutions(channels), slope=0.1) for _ in range(scales))

    @staticmethod
    def _convolutions(channels: int) -> list[nn.Module]:
        return [
            nn.Conv1d(1, channels, 15, padding=7),
            nn.Conv1d(channels, channels, 41, 2, 20, groups=4),
            nn.Conv1d(channels, 2 * channels, 41, 2, 20, groups=16),
            nn.Conv1d(2 * channels, 4 * channels, 41, 4, 20, groups=16),
            nn.Conv1d(4 * channels, 8 * channels, 41, 4, 20, groups=16),
            nn.Conv1d(8 * channels, 8 * channels, 41, 1, 20, groups=16),
            nn.Conv1d(8 * channels, 8 * channels, 5, padding=2),
            nn.Conv1d(8 * channels, 1, 3, padding=1),
        ]

    def forward(self, waveform: Tensor) -> list[DiscriminatorOutput]:
        x = waveform[:, None]
        outputs = []
        for network in self.networks:
            outputs.append(network(x))
            x = F.avg_pool1d(x, 4, 2, 2)
        return outputs


def make_discriminators(stft_filters: int = 32, period_channels: int = 0, scale_channels: int = 0) -> nn.ModuleList:
    """One discriminator of each kind with the given width; none of a kind whose width is 0."""
    kinds = (MultiScaleSTFTDiscriminator, MultiPeriodDiscriminator, MultiScaleDiscriminator)
    widths = (stft_filters, period_channels, scale_channels)
    return nn.ModuleList(kind(width) for kind, width in zip(kinds, widths, strict=True) if width)


def discriminator_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput], kind: Kind) -> Tensor:
    """The loss of the discriminators (eq. 6), low if real speech scores high and reconstructions score low.

    hinge: E[max(0, 1 - D(x))] + E[max(0, 1 + D(x'))]; least_squares: E[(1 - D(x))^2] + E[D(x')^2]. Mean over
    discriminators (HiFi-GAN sums), scalar.
    """

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        if kind == "hinge":
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return (1 - real).square().mean() + fake.square().mean()

    return torch.stack([loss(r.scores, f.scores) for r, f in zip(real, fake, strict=True)]).mean()


def adversarial_loss(fake: list[DiscriminatorOutput], kind: Kind) -> Tensor:
    """The loss of the generator: hinge -E[D(x')], least_squares E[(1 - D(x'))^2]; mean over discriminators."""
    losses = [-f.scores.mean() if kind == "hinge" else (1 - f.scores).square().mean() for f in fake]
    return torch.stack(losses).mean()


def feature_matching_loss(
    real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput], relative: bool = True
) -> Tensor:
    """L1 distance of hidden activations, mean over all layers of all discriminators; no gradient for `real`.

    relative: divide each distance by the layer's mean activation for real speech (EnCodec, eq. 2); otherwise plain L1
    (HiFi-GAN, eq. 4, which sums over layers instead).
    """
    distances = []
    for r, f in zip(real, fake, strict=True):
        for target, reconstructed in zip(r.features, f.features, strict=True):
            target = target.detach().float()
            unit = target.abs().mean().clamp(min=1e-5) if relative else 1.0
            distances.append(F.l1_loss(reconstructed.float(), target) / unit)
    return torch.stack(distances).mean()


class Adversary(nn.Module):
    """All discriminators with their optimizer (Adam); the codec is the generator.

    `state_dict` includes the optimizer, so that training can be resumed exactly.
    """

    def __init__(
        self,
        discriminators: Iterable[nn.Module],
        kind: Kind,
        learning_rate: float,
        betas: tuple[float, float] = (0.5, 0.9),
        relative_features: bool = True,
    ):
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)
        self.kind, self.relative_features = kind, relative_features
        self.optimizer = torch.optim.Adam(self.parameters(), learning_rate, betas)

    def discriminate(self, waveform: Tensor) -> list[DiscriminatorOutput]:
        """Waveform float [B, N] -> the outputs of all discriminators."""
        return [output for discriminator in self.discriminators for output in discriminator(waveform)]

    def train_step(self, real: Tensor, fake: Tensor) -> Tensor:
        """One optimizer step of the discriminators on waveforms float [B, N]; returns their loss, detached.

        `fake` receives no gradient; the gradients of the discriminators are averaged over all processes. If they are
        not finite, no step is made.
        """
        loss = discriminator_loss(self.discriminate(real), self.discriminate(fake.detach()), self.kind)
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(list(self.parameters()))
        if nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]).isfinite():
            self.optimizer.step()
        return loss.detach()

    def losses(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The generator's losses "adversarial" and "feature_matching": scalars with a gradient for `fake` only."""
        # frozen before the first forward pass: for trainable parameters autocast would reuse its copies from before
        # the step
        self.requires_grad_(False)
        with torch.no_grad():
            of_real = self.discriminate(real)
        of_fake = self.discriminate(fake)
        self.requires_grad_(True)
        return {
            "adversarial": adversarial_loss(of_fake, self.kind),
            "feature_matching": feature_matching_loss(of_real, of_fake, self.relative_features),
        }

    def get_extra_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
