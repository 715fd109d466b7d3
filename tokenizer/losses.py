"""Reconstruction losses of the codec (the L_Encodec of eq. 7, without its adversary)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram


class MultiScaleMelLoss(nn.Module):
    """Distance of log-mel spectrograms at several window sizes: L1 plus L2, mean over the scales.

    EnCodec's spectral loss (arXiv 2210.13438, eq. 3) on the logarithm of the mel energies. Bands: a sixteenth of the
    window, so that no filter is empty.
    """

    def __init__(self, sample_rate: int, windows: tuple[int, ...] = (256, 512, 1024, 2048)):
        super().__init__()
        self.mels = nn.ModuleList(
            MelSpectrogram(sample_rate, n_fft=window, hop_length=window // 4, n_mels=window // 16, power=1)
            for window in windows
        )

    def forward(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        """Waveforms float [B, N] with N above half the largest window -> scalar."""
        with torch.autocast(original.device.type, enabled=False):
            losses = []
            for mel in self.mels:
                a, b = (torch.log(mel(x.float()).clamp(min=1e-5)) for x in (reconstruction, original))
                losses.append(F.l1_loss(a, b) + F.mse_loss(a, b).sqrt())
            return torch.stack(losses).mean()


def scale_for(weight: float, cap: float | None, gradient: Tensor, reference: Tensor) -> tuple[float, float]:
    """Weight an auxiliary loss by its gradient at the latents z0, relative to the reconstruction's.

    Returns the factor to multiply the auxiliary gradient with and the ratio of norms it then has. The factor is
    `weight`, lowered where the ratio would exceed `cap`: fixing the gradient of the layers above the first (see
    `ResidualVectorQuantizer`) lets eq. 5 reshape z0, and from a ratio of about one on it destroys the code.
    """
    ratio = float(gradient.norm() / reference.norm().clamp(min=1e-12))
    factor = weight if cap is None or ratio * weight <= cap else cap / ratio
    return factor, factor * ratio
