"""The losses against EnCodec's balancer and DAC's objective, written again from their descriptions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from tokenizer.training.discriminators import Adversary, make_discriminators
from tokenizer.training.losses import Balancer, MultiScaleMelLoss, ReconstructionLoss

WINDOWS, BANDS = [32, 64, 128, 256, 512, 1024, 2048], [5, 10, 20, 40, 80, 160, 320]  # DAC's, for 16 kHz


def test_the_balancer_is_encodecs() -> None:
    """g_i -> R lambda_i / sum(lambda) g_i / <|g_i|>, where <.> is a moving average (arXiv 2210.13438, section 3.4).

    R is 1, the norm is that of an utterance, averaged over the batch, and the moving average of n values v is
    sum(beta^(n - k) v_k) / sum(beta^(n - k)), as the authors' code has it.
    """
    weights, beta, generator = {"a": 0.1, "b": 3.0, "c": 1.0}, 0.9, np.random.default_rng(0)
    scales = {"a": 1e-3, "b": 1.0, "c": 50.0}
    balancer, norms = Balancer(weights, decay=beta), {name: [] for name in weights}
    for _ in range(6):
        gradients = {name: scale * generator.normal(size=(4, 30)) for name, scale in scales.items()}
        found = balancer.weigh({name: torch.from_numpy(gradient) for name, gradient in gradients.items()})
        for name, gradient in gradients.items():
            norms[name].append(np.sqrt((gradient**2).sum(1)).mean())
            powers = beta ** np.arange(len(norms[name]))[::-1]
            average = (powers * norms[name]).sum() / powers.sum()
            expected = weights[name] / sum(weights.values()) * gradient / average
            np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5)


def dac_mel_loss(fake: Tensor, real: Tensor) -> Tensor:
    """The sum over scales of the mean distance of log10 mel magnitudes (arXiv 2306.06546, section 3.5)."""
    total = torch.zeros((), dtype=torch.float64)
    for window, bands in zip(WINDOWS, BANDS, strict=True):
        filters = melscale_fbanks(window // 2 + 1, 0.0, 8_000.0, bands, 16_000).double()
        spectra = []
        for waveform in (fake, real):
            padded = torch.nn.functional.pad(waveform[:, None], (window // 2, window // 2), "reflect")[:, 0]
            frames = padded.unfold(1, window, window // 4) * torch.hann_window(window, dtype=torch.float64)
            spectra.append(torch.log10((torch.fft.rfft(frames).abs() @ filters).clamp(min=1e-5)))
        total = total + (spectra[0] - spectra[1]).abs().mean()
    return total


@pytest.fixture(scope="module")
def speech() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    real = 0.1 * torch.randn(2, 4_000, generator=draw)
    return real, real + 0.05 * torch.randn(2, 4_000, generator=draw)


def test_the_mel_loss_is_dacs_but_for_the_base_of_the_logarithm(speech: tuple[Tensor, Tensor]) -> None:
    real, fake = (waveform.double() for waveform in speech)
    ours = MultiScaleMelLoss(16_000, WINDOWS, BANDS, [1.0] * 7, squared=False)
    torch.testing.assert_close(
        ours(fake.float(), real.float()).double(), math.log(10) * dac_mel_loss(fake, real), rtol=1e-4, atol=0
    )


@pytest.fixture(scope="module")
def adversary() -> Adversary:
    torch.manual_seed(0)
    return Adversary(make_discriminators(4, 4, 0), "least_squares", 1e-4, relative_features=False)


def test_the_gradient_at_the_waveform_is_dacs(speech: tuple[Tensor, Tensor], adversary: Adversary) -> None:
    """15 mel + 2 feature matching + 1 adversarial loss, these summed over discriminators and layers."""
    real, fake = speech

    def outputs(waveform: Tensor) -> list[tuple[list[Tensor], Tensor]]:
        return [(out.features, out.scores) for network in adversary.discriminators for out in network(waveform)]

    leaf = fake.clone().requires_grad_()
    mel = dac_mel_loss(leaf.double(), real.double())
    adversarial, features = torch.zeros(()), torch.zeros(())
    for (layers, scores), (wanted, _) in zip(outputs(leaf), outputs(real), strict=True):
        adversarial = adversarial + (1 - scores).square().mean()
        for layer, target in zip(layers, wanted, strict=True):
            features = features + (layer - target.detach()).abs().mean()
    (expected,) = torch.autograd.grad(15 * mel.float() + 2 * features + adversarial, leaf)

    weights = {"mel": 15 / math.log(10), "adversarial": 1.0, "feature_matching": 2.0}
    assert weights["mel"] == pytest.approx(6.5, rel=0.01)  # of best.yaml
    scales = MultiScaleMelLoss(16_000, WINDOWS, BANDS, [1.0] * 7, squared=False)
    ours = fake.clone().requires_grad_()
    loss, found = ReconstructionLoss(weights, scales, adversary)(ours, real)
    loss.backward()
    assert float(found["adversarial"]) == pytest.approx(float(adversarial), rel=1e-4)
    assert float(found["feature_matching"]) == pytest.approx(float(features), rel=1e-4)
    assert (ours.grad - expected).norm() < 1e-3 * expected.norm()


def test_the_discriminators_loss_is_dacs(
    speech: tuple[Tensor, Tensor], adversary: Adversary, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = speech
    expected = sum(
        float(on_fake.scores.square().mean() + (1 - on_real.scores).square().mean())
        for on_fake, on_real in zip(adversary.discriminate(fake), adversary.discriminate(real), strict=True)
    )
    monkeypatch.setattr(adversary.optimizer, "step", lambda: None)
    assert float(adversary.train_step(real, fake)) == pytest.approx(expected, rel=1e-4)
