"""What the reconstructed waveform is judged by: the L_Encodec of eq. 7, and how its parts are weighed."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from tokenizer.training.discriminators import Adversary
from tokenizer.training.distributed import mean_over_processes
from tokenizer.training.teachers import SemanticTeacher


class MultiScaleMelLoss(nn.Module):
    """Distance of log-mel spectrograms at several window sizes: mean over the scales of L1, plus L2 where wanted.

    The defaults follow EnCodec's spectral loss (arXiv 2210.13438, section 3.4) on the logarithm of the mel energies.
    Windows in samples, the hop is a quarter of the window. bands: mel bands per scale; a sixteenth of the window when
    None, so that no filter is empty. weights: of the scales, one each when None (SpeechTokenizer: 45, 1, 1, 1).
    """

    def __init__(
        self,
        sample_rate: int,
        windows: Sequence[int] = (256, 512, 1024, 2048),
        bands: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        squared: bool = True,
    ):
        super().__init__()
        bands = [window // 16 for window in windows] if bands is None else bands
        self.mels = nn.ModuleList(
            MelSpectrogram(sample_rate, n_fft=window, hop_length=window // 4, n_mels=count, power=1)
            for window, count in zip(windows, bands, strict=True)
        )
        self.weights = [1 / len(windows)] * len(windows) if weights is None else list(weights)
        self.squared = squared

    def forward(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        """Waveforms float [B, N] with N above half the largest window -> scalar."""
        with torch.autocast(original.device.type, enabled=False):
            total = original.new_zeros(())
            for mel, weight in zip(self.mels, self.weights, strict=True):
                a, b = (torch.log(mel(x.float()).clamp(min=1e-5)) for x in (reconstruction, original))
                total = total + weight * (F.l1_loss(a, b) + (F.mse_loss(a, b).sqrt() if self.squared else 0))
            return total


class Balancer:
    """EnCodec's balancer (arXiv 2210.13438, section 3.4): weights become shares of the gradient at the waveform.

    Each loss's gradient is divided by a moving average of its norm per utterance, so that its weight means the same
    whatever its scale. Divided also by the number of utterances: the sum is that of a mean over the batch, and does not
    depend on how a batch is shared by processes.
    """

    def __init__(self, weights: Mapping[str, float], decay: float = 0.999):
        self.weights, self.decay = dict(weights), decay
        self.norms: dict[str, Tensor] = {}  # moving averages, by name
        self.updates: dict[str, int] = {}

    def combine(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients float [B, N] by name of the loss -> their balanced sum, float [B, N]."""
        total = sum(self.weights[name] for name in gradients)
        combined = torch.zeros_like(next(iter(gradients.values())))
        for name, gradient in gradients.items():
            norm = mean_over_processes(gradient.norm(dim=1).mean())
            self.updates[name] = self.updates.get(name, 0) + 1
            before = self.norms.get(name, torch.zeros_like(norm)).to(norm.device)  # a restored one is on the CPU
            self.norms[name] = torch.lerp(before, norm, 1 - self.decay)
            average = self.norms[name] / (1 - self.decay ** self.updates[name])  # without the zero it started from
            combined += self.weights[name] / total / len(gradient) * gradient / average.clamp(min=1e-12)
        return combined

    def state_dict(self) -> dict[str, dict]:
        """The moving averages, for `load_state_dict`."""
        return {"norms": self.norms, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, dict]) -> None:
        """Go on from a `state_dict`."""
        self.norms, self.updates = dict(state["norms"]), dict(state["updates"])


class ReconstructionLoss:
    """L_Encodec of eq. 7 as a function of the reconstructed waveform: the weighted, or balanced, sum of

    time: L1 of the waveform. mel: `MultiScaleMelLoss`. adversarial and feature_matching: of the `adversary` (eq. 6).
    speech_features: L1 between what a frozen speech model, `listener`, hears in both waveforms. Losses without a weight
    do not count. commitment (weight 1 where none is given) is no function of the waveform: `codec_backward` adds it,
    outside the balancer.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        mel: MultiScaleMelLoss,
        adversary: Adversary | None = None,
        listener: SemanticTeacher | None = None,
        balancer: Balancer | None = None,
    ):
        self.weights, self.mel, self.adversary = dict(weights), mel, adversary
        self.listener, self.balancer = listener, balancer

    def losses(self, reconstruction: Tensor, original: Tensor) -> dict[str, Tensor]:
        """Waveforms float [B, N] -> scalars by name, of those that have a weight."""
        losses = {"time": F.l1_loss(reconstruction, original), "mel": self.mel(reconstruction, original)}
        if self.adversary is not None:
            losses |= self.adversary.losses(original, reconstruction)
        if self.listener is not None:
            losses["speech_features"] = F.l1_loss(self.listener.features(reconstruction), self.listener(original))
        return {name: loss for name, loss in losses.items() if self.weights.get(name)}

    def gradient(self, reconstruction: Tensor, original: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Waveforms float [B, N] -> gradient float [B, N] for the reconstruction, and the losses, detached."""
        leaf = reconstruction.detach().requires_grad_()
        losses = self.losses(leaf, original)
        if self.balancer is None:
            total = sum((self.weights[name] * loss for name, loss in losses.items()), leaf.new_zeros(()))
            gradient = torch.autograd.grad(total, leaf)[0]
        else:
            # two losses share the discriminators' graph
            each = {name: torch.autograd.grad(loss, leaf, retain_graph=True)[0] for name, loss in losses.items()}
            gradient = self.balancer.combine(each)
        return gradient, {name: loss.detach() for name, loss in losses.items()}


def gradient_ratio(gradient: Tensor, reference: Tensor) -> Tensor:
    """Norm of one gradient relative to another's over the whole batch, on all processes: a scalar."""
    squares = mean_over_processes(torch.stack([gradient.square().sum(), reference.square().sum()]))
    return (squares[0] / squares[1].clamp(min=1e-24)).sqrt()
