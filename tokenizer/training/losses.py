"""Losses of the reconstructed waveform: L_Encodec of eq. 7, and the weighting of its parts at the waveform."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from tokenizer.training.discriminators import Adversary
from tokenizer.training.distributed import mean_over_processes, process_count
from tokenizer.training.teachers import SemanticTeacher


class MultiScaleMelLoss(nn.Module):
    """Distance of compressed mel spectrograms at several window sizes (scales): L1, plus L2 if `squared`.

    The defaults follow EnCodec's spectral loss (arXiv 2210.13438, section 3.4) on the logarithm of the mel magnitudes;
    its released code takes L1 of the magnitudes themselves, so that what is loud counts more.
    With `power` p, in place of the logarithm stands (x^p - 1) / p (Box and Cox 1964), which is the logarithm for p = 0:
    what is quiet counts less, as for the ear, whose loudness grows with p = 0.46 of the magnitude (Zwicker).
    Windows in samples; the hop is a quarter of the window. bands: mel bands per scale; a sixteenth of the window when
    None, so that no filter is empty. weights: per scale; their mean when None (SpeechTokenizer: 45, 1, 1, 1).
    """

    def __init__(
        self,
        sample_rate: int,
        windows: Sequence[int] = (256, 512, 1024, 2048),
        bands: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        squared: bool = True,
        power: float = 0.0,
    ):
        super().__init__()
        bands = [window // 16 for window in windows] if bands is None else bands
        self.mels = nn.ModuleList(
            MelSpectrogram(sample_rate, n_fft=window, hop_length=window // 4, n_mels=count, power=1)
            for window, count in zip(windows, bands, strict=True)
        )
        self.weights = [1 / len(windows)] * len(windows) if weights is None else list(weights)
        self.squared, self.power = squared, power
        self.shortest = max(windows) // 2 + 1  # samples, which the largest window mirrors at the ends

    def forward(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        """Waveforms float [B, N], N at least `shortest` -> scalar."""
        with torch.autocast(original.device.type, enabled=False):
            total = original.new_zeros(())
            for mel, weight in zip(self.mels, self.weights, strict=True):
                a, b = (self._compressed(mel(x.float()).clamp(min=1e-5)) for x in (reconstruction, original))
                distance = F.l1_loss(a, b)
                if self.squared:
                    distance = distance + F.mse_loss(a, b).sqrt()
                total = total + weight * distance
            return total

    def _compressed(self, x: Tensor) -> Tensor:
        return (x.pow(self.power) - 1) / self.power if self.power else x.log()


class Balancer:
    """EnCodec's balancer (arXiv 2210.13438, section 3.4): weights are shares of the gradient at the waveform.

    The gradient of each loss is divided by a moving average of its norm per utterance, so that weights do not depend on
    the scales of the losses. Every utterance of the batch adds a gradient of norm 1, in total, whatever the size of the
    batch and the number of processes that share it: hence the factor for processes, which average their gradients.
    Losses beside it, at the latents, are means over the batch (as the commitment in EnCodec's code): in a batch that is
    twice as large they weigh half as much beside what is balanced.
    """

    def __init__(self, weights: Mapping[str, float], decay: float = 0.999):
        self.weights, self.decay = dict(weights), decay
        self.norms: dict[str, Tensor] = {}  # moving averages, by name
        self.updates: dict[str, int] = {}

    def weigh(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients float [B, N] by name of the loss -> the same, balanced."""
        total = sum(self.weights[name] for name in gradients)
        weighed = {}
        for name, gradient in gradients.items():
            norm = mean_over_processes(gradient.norm(dim=1).mean())
            self.updates[name] = self.updates.get(name, 0) + 1
            before = self.norms.get(name, torch.zeros_like(norm))
            before = before.to(norm.device)  # a norm from a checkpoint is on the CPU
            self.norms[name] = torch.lerp(before, norm, 1 - self.decay)
            average = self.norms[name] / (1 - self.decay ** self.updates[name])  # without the bias of the initial zero
            weighed[name] = process_count() * self.weights[name] / total * gradient / average.clamp(min=1e-12)
        return weighed

    def state_dict(self) -> dict[str, dict]:
        """The moving averages, for `load_state_dict`."""
        return {"norms": self.norms, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, dict]) -> None:
        """Restore the moving averages from a `state_dict`."""
        self.norms, self.updates = dict(state["norms"]), dict(state["updates"])


class ReconstructionLoss:
    """L_Encodec of eq. 7 as a function of the reconstructed waveform: the weighted (or balanced) sum of these losses.

    time: L1 of the waveform. mel: `MultiScaleMelLoss`. adversarial, feature_matching: from the `adversary` (eq. 6).
    speech_features: L1 between the features of both waveforms by a frozen speech model, `perceptual_model`. Losses
    without a weight are omitted. commitment (weight 1 by default) does not depend on the waveform: `CodecLoss`
    adds it, outside the balancer.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        mel: MultiScaleMelLoss,
        adversary: Adversary | None = None,
        perceptual_model: SemanticTeacher | None = None,
        balancer: Balancer | None = None,
    ):
        self.weights = dict(weights)
        self.mel = mel
        self.adversary = adversary
        self.perceptual_model = perceptual_model
        self.balancer = balancer

    def losses(self, reconstruction: Tensor, original: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """Waveforms float [B, N] -> scalars by name, for the losses that have a weight.

        features: of the original by the perceptual model, if they are known.
        """
        losses = {"time": F.l1_loss(reconstruction, original), "mel": self.mel(reconstruction, original)}
        if self.adversary is not None:
            losses |= self.adversary.losses(original, reconstruction)
        if self.perceptual_model is not None:
            features = self.perceptual_model(original) if features is None else features
            losses["speech_features"] = F.l1_loss(self.perceptual_model.features(reconstruction), features)
        return {name: loss for name, loss in losses.items() if self.weights.get(name)}

    def __call__(
        self, reconstruction: Tensor, original: Tensor, features: Tensor | None = None, shares: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `losses` -> a scalar with the weighted gradient of all of them, and the losses, detached.

        The value of the scalar means nothing. shares: also return `<name>_share`, the part of each loss in the sum of
        the norms of the weighted gradients at the reconstruction. It takes a backward pass to the reconstruction for
        every loss, as a balancer always does, and changes nothing else.
        """
        leaf = reconstruction.detach().requires_grad_()
        losses = self.losses(leaf, original, features)
        each: dict[str, Tensor] = {}
        if shares or self.balancer is not None:  # retained because two losses share the discriminators' graph
            each = {name: torch.autograd.grad(loss, leaf, retain_graph=True)[0] for name, loss in losses.items()}
        if self.balancer is None:
            total = sum((self.weights[name] * loss for name, loss in losses.items()), leaf.new_zeros(()))
            gradient = torch.autograd.grad(total, leaf)[0] if losses else torch.zeros_like(leaf)
            each = {name: self.weights[name] * own for name, own in each.items()}
        else:
            each = self.balancer.weigh(each)
            gradient = sum(each.values(), torch.zeros_like(leaf))
        found = {name: loss.detach() for name, loss in losses.items()}
        if shares and each:
            norms = mean_over_processes(torch.stack([own.norm(dim=1).mean() for own in each.values()]))
            found |= {f"{name}_share": share for name, share in zip(each, norms / norms.sum(), strict=True)}
        return (reconstruction * gradient).sum(), found
