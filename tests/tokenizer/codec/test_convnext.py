"""The codec body at the frame rate: its spectra, its local attention, exact lengths."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.transforms import MelSpectrogram

from speechllm import SpeechCodecConfig
from tokenizer.codec import convnext
from tokenizer.codec.convnext import (
    REACH,
    SPECTRA,
    SUBFRAMES,
    ConvNeXtDecoder,
    ConvNeXtEncoder,
    GriffinLim,
    InverseSTFT,
    LocalAttention,
    LogMelSpectra,
    rotate,
)
from tokenizer.errors import InputError

pytestmark = pytest.mark.numeric

SMALL = {"body": "convnext", "width": 16, "depth": 2}


@pytest.fixture
def speech() -> Tensor:
    """Float [1, 9_600]: harmonics of a falling pitch, louder and softer like syllables, and a little noise."""
    seconds = torch.arange(9_600) / 16_000
    phase = 2 * math.pi * (180 * seconds - 40 * seconds.square())
    voice = sum(torch.sin(k * phase) / k for k in range(1, 20)) * torch.sin(12 * seconds).abs()
    return (0.2 * voice + 0.002 * torch.randn(9_600, generator=torch.Generator().manual_seed(0)))[None]


@pytest.mark.parametrize("phases", ["predicted", "griffin_lim"])
@pytest.mark.parametrize("samples", [1, 319, 320, 321, 5_000])
def test_lengths_are_exact(noise: Callable[..., Tensor], samples: int, phases: str) -> None:
    frames = math.ceil(samples / 320)
    z = ConvNeXtEncoder(8, 16, 2, 16_000, 320, causal=False).eval()(noise(samples, 2)[:, None])
    assert z.shape == (2, 8, frames)
    assert ConvNeXtDecoder(8, 16, 2, 320, causal=False, phases=phases)(z).shape == (2, 1, 320 * frames)


def test_the_spectra_are_those_of_torchaudio_centred_on_the_frame(noise: Callable[..., Tensor]) -> None:
    waveform = noise(320 * 20)
    found = LogMelSpectra(16_000, 320, causal=False)(waveform[:, None])
    assert found.shape == (1, 260, 20)
    size, bands, _ = SPECTRA[0]
    settings = {"n_fft": 2 * size, "win_length": size, "hop_length": 320, "n_mels": bands, "center": False}
    mel = MelSpectrogram(16_000, **settings)
    margin = (size - 320) // 2 + size // 2  # torch.stft centres a short window in its longer transform
    expected = torch.log(mel(F.pad(waveform, (margin, margin))) + 1e-4) / 4 + 1
    torch.testing.assert_close(found[:, :bands], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_spectra_that_a_waveform_has_give_the_waveform_back(noise: Callable[..., Tensor], causal: bool) -> None:
    inverse, waveform = InverseSTFT(320, causal), noise(320 * 12)
    found = inverse.overlap(inverse.spectra(waveform))
    first = 80 if causal else 0  # where the waveform fades in
    assert found.shape == waveform.shape
    torch.testing.assert_close(found[:, first:], waveform[:, first:], atol=1e-5, rtol=0)


def test_griffin_and_lim_find_phases_that_fit_the_magnitudes(speech: Tensor) -> None:
    """Of the same spectra with their own phases, so that a loss of them is one of the magnitudes, and without."""
    head = GriffinLim(320)
    levels = torch.log(head.spectra(speech).abs()).unflatten(1, (-1, SUBFRAMES)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(head.with_phases_of(speech, levels)[:, 0], speech, atol=1e-5, rtol=0)

    def misfit(waveform: Tensor) -> float:
        wanted = head.spectra(speech).abs()
        return float((head.spectra(waveform).abs() - wanted).norm() / wanted.norm())

    found = head(levels)[:, 0]
    once = head.overlap(head.spectra(speech).abs().to(torch.complex64))
    assert found.shape == speech.shape and misfit(found) < 0.25 < misfit(once)


def test_sharpened_magnitudes_have_deeper_valleys_and_the_same_loudness(
    speech: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = GriffinLim(320)
    levels = head.levels(speech)

    def decoded(power: float) -> Tensor:
        monkeypatch.setattr(convnext, "SHARPNESS", power)
        return head.spectra(head(levels)[:, 0]).abs()

    plain, sharp = decoded(1.0), decoded(1.2)
    assert float(sharp.norm() / plain.norm()) == pytest.approx(1, abs=0.05)
    valleys = torch.tensor([0.1, 0.3])
    assert (sharp.log().quantile(valleys, 2).mean((1, 2)) < plain.log().quantile(valleys, 2).mean((1, 2)) - 0.1).all()
    silent = head(torch.full_like(levels, -1e4))
    assert torch.equal(silent, torch.zeros_like(silent))


def test_a_decoder_without_phases_of_its_own_takes_those_it_is_given(speech: Tensor) -> None:
    torch.manual_seed(0)
    decoder, z = ConvNeXtDecoder(8, 16, 2, 320, False, "griffin_lim"), torch.randn(1, 8, speech.shape[1] // 320)
    levels = decoder.output(decoder.blocks(decoder.input(z)))
    assert torch.equal(decoder(z, speech), decoder.inverse.with_phases_of(speech, levels))
    assert torch.equal(decoder(z), decoder.inverse(levels))
    cut = speech[:, :-100]  # the end of an utterance: zeros follow
    assert torch.equal(decoder(z, cut), decoder(z, F.pad(cut, (0, 100))))
    predicting = ConvNeXtDecoder(8, 16, 2, 320, False, "predicted")
    assert torch.equal(predicting(z, speech), predicting(z))


def test_attention_sees_nearby_frames_only_wherever_they_are() -> None:
    torch.manual_seed(0)
    attention = LocalAttention(16, 1.0, causal=False)
    x = torch.randn(1, 16, 80)
    changed = x.clone()
    changed[..., 40] += torch.randn(16)
    moved = (attention(changed) - attention(x)).abs().amax((0, 1)) > 1e-7
    assert moved.nonzero().flatten().tolist() == list(range(40 - REACH, 40 + REACH + 1))
    shifted = attention(F.pad(x, (9, 0), value=5.0))[..., 9 + REACH :]
    torch.testing.assert_close(shifted, attention(x)[..., REACH:], atol=1e-5, rtol=1e-5)


def test_rotations_depend_on_distances_only() -> None:
    query, key = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    scores = [
        (rotate(query, torch.tensor([place + 3])) * rotate(key, torch.tensor([place]))).sum() for place in (0, 50)
    ]
    torch.testing.assert_close(*scores)


def test_a_causal_body_sees_no_future() -> None:
    torch.manual_seed(0)
    encoder = ConvNeXtEncoder(8, 16, 2, 16_000, 320, causal=True).eval()
    decoder = ConvNeXtDecoder(8, 16, 2, 320, True, "predicted")
    waveform = torch.randn(1, 1, 320 * 30, requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder(waveform)[..., 10].sum(), waveform)
    assert gradient[..., : 320 * 11].any() and not gradient[..., 320 * 11 :].any()
    z = torch.randn(1, 8, 30, requires_grad=True)
    (gradient,) = torch.autograd.grad(decoder(z)[..., : 320 * 11].sum(), z)
    assert gradient[..., 10].any() and not gradient[..., 11:].any()


def test_a_causal_window_gives_most_of_a_frame_to_its_own_spectra() -> None:
    """Under a symmetric one it would be 27 %."""
    shares = InverseSTFT(320, causal=True).window.square().view(4, 160)  # of a step's own spectrum and the three before
    shares = (shares / shares.sum(0)).mean(1)
    assert (shares[0] + shares[:2].sum()) / 2 > 0.5  # the frame's first step, and its second


def test_settings_that_do_not_fit_the_body_are_refused() -> None:
    with pytest.raises(InputError, match="body convnext needs"):
        SpeechCodecConfig(**SMALL, strides=(2, 5, 5))
    for width in (63, 130, 200):
        with pytest.raises(InputError, match=f"multiple of .* heads, got {width}"):
            SpeechCodecConfig(**SMALL | {"width": width})
    for settings in ({}, {**SMALL, "causal": True}):
        with pytest.raises(InputError, match="phases griffin_lim needs"):
            SpeechCodecConfig(**settings, phases="griffin_lim")
    with pytest.raises(InputError, match="even dimension, got 9"):
        SpeechCodecConfig(**SMALL, quantizer="split", dimension=9)
