"""Metrics of reconstructed speech: against direct calls of the packages, by hand, and pairs without a score."""

import pickle
import sys
from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from speechllm import InputError, Quality, QualityError, SpeechCodec, reconstruct, speech_quality
from tokenizer.audio import resample
from tokenizer.metrics.quality import layer_counts, pesq_and_stoi

pesq = pytest.importorskip("pesq")
pystoi = pytest.importorskip("pystoi")

RATE = 16_000


@pytest.fixture(scope="module")
def original(noise: Callable[..., Tensor]) -> Tensor:
    return noise(2 * RATE)[0]


@pytest.fixture(scope="module")
def reconstruction(original: Tensor) -> Tensor:
    return 0.5 * original + 0.02 * torch.randn(len(original), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def quality(original: Tensor, reconstruction: Tensor) -> Quality:
    return speech_quality(original, reconstruction, RATE)


def reason(original: Tensor, reconstruction: Tensor) -> str:
    with pytest.raises(QualityError) as caught:
        speech_quality(original, reconstruction, RATE)
    assert str(caught.value) == caught.value.detail != caught.value.reason
    return caught.value.reason


# ---- scores


def test_pesq_and_stoi_are_those_of_the_packages(original: Tensor, reconstruction: Tensor, quality: Quality) -> None:
    pair = original.numpy(), reconstruction.numpy()
    assert quality.pesq_wb == pesq.pesq(RATE, *pair, "wb")
    assert quality.pesq_nb == pesq.pesq(RATE, *pair, "nb") != quality.pesq_wb
    assert quality.stoi == pystoi.stoi(*pair, RATE)


def test_si_sdr_is_the_ratio_of_le_roux(original: Tensor, reconstruction: Tensor, quality: Quality) -> None:
    s, x = (waveform.double() - waveform.double().mean() for waveform in (original, reconstruction))
    target = (x @ s) / (s @ s) * s
    expected = 10 * torch.log10(target.square().sum() / (target - x).square().sum())
    assert quality.si_sdr == pytest.approx(float(expected), abs=1e-4)
    assert 5 < quality.si_sdr < 20


def test_the_mel_distance_is_that_of_numpy(original: Tensor, reconstruction: Tensor, quality: Quality) -> None:
    def log_mel(waveform: Tensor) -> np.ndarray:
        padded = np.pad(waveform.double().numpy(), 512, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, 1024)[::256]
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
        filters = melscale_fbanks(513, 0.0, 8_000.0, 80, RATE).numpy()
        return np.log10(np.maximum(np.abs(np.fft.rfft(frames * window)) @ filters, 1e-5))

    expected = np.abs(log_mel(original) - log_mel(reconstruction)).mean()
    assert quality.mel_distance == pytest.approx(expected, rel=1e-4)
    assert expected > 0.05


def test_an_original_is_its_own_best_reconstruction(original: Tensor) -> None:
    best = speech_quality(original, original, RATE)
    assert pesq_and_stoi(original, original, RATE) == {"pesq_wb": best.pesq_wb, "stoi": best.stoi}
    assert best.pesq_wb == pytest.approx(4.644, abs=1e-3) and best.pesq_nb == pytest.approx(4.549, abs=1e-3)
    assert best.stoi == pytest.approx(1) and best.mel_distance == 0
    assert 100 < best.si_sdr < 160  # finite: it can stand in JSON


def test_more_noise_is_worse_by_every_measure(original: Tensor) -> None:
    noise = torch.randn(len(original), generator=torch.Generator().manual_seed(2))
    little, much = (np.array(astuple(speech_quality(original, original + a * noise, RATE))) for a in (0.01, 0.1))
    assert (little[:4] > much[:4]).all() and little[4] < much[4]


def test_the_level_matters_to_the_mel_distance_only(original: Tensor, reconstruction: Tensor, quality: Quality) -> None:
    quiet = speech_quality(original, 0.25 * reconstruction, RATE)
    np.testing.assert_allclose(astuple(quiet)[:4], astuple(quality)[:4], rtol=1e-3)
    assert quiet.mel_distance > quality.mel_distance + 0.3  # a quarter is 0.6 in log10


def test_a_constant_is_neither_speech_nor_an_error_to_si_sdr(original: Tensor, reconstruction: Tensor) -> None:
    shifted = speech_quality(original, reconstruction + 0.1, RATE)
    assert shifted.si_sdr == pytest.approx(speech_quality(original, reconstruction, RATE).si_sdr, abs=1e-3)
    unrelated = speech_quality(original, torch.full_like(original, 0.1), RATE)
    assert -160 < unrelated.si_sdr < -100


def test_other_rates_are_measured_at_16_khz(original: Tensor, reconstruction: Tensor) -> None:
    fast = [resample(waveform, RATE, 24_000) for waveform in (original, reconstruction)]
    assert speech_quality(*fast, 24_000) == speech_quality(*(resample(x, 24_000, RATE) for x in fast), RATE)


def test_arrays_are_waveforms_too(original: Tensor, reconstruction: Tensor, quality: Quality) -> None:
    assert speech_quality(original.numpy(), reconstruction.clone().requires_grad_(), RATE) == quality


def test_a_frame_more_or_less_is_cut_off(original: Tensor, reconstruction: Tensor) -> None:
    short = reconstruction[:-320]
    assert speech_quality(original, short, RATE) == speech_quality(original[:-320], short, RATE)
    assert speech_quality(short, original, RATE) == speech_quality(short, original[:-320], RATE)


# ---- pairs without scores


def test_silence_has_no_score(original: Tensor) -> None:
    nothing = torch.zeros_like(original)
    assert reason(original, nothing) == reason(nothing, original) == "silent"


@pytest.mark.parametrize("samples", [0, 1, 3_999])
def test_less_than_a_quarter_of_a_second_is_too_short(original: Tensor, samples: int) -> None:
    assert reason(original[:samples], original[:samples]) == "too short"


def test_too_little_speech_for_stoi_is_too_short_instead_of_0_00001(original: Tensor) -> None:
    with pytest.warns(RuntimeWarning):
        assert pystoi.stoi(original[:5_000].numpy(), original[:5_000].numpy(), RATE) == 1e-5
    assert reason(original[:5_000], original[:5_000]) == "too short"


def test_minutes_are_too_long_for_pesq(noise: Callable[..., Tensor]) -> None:
    minute = noise(60 * RATE)[0]
    assert reason(minute, minute) == "too long"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_sample_without_a_value_is_non_finite(original: Tensor, value: float) -> None:
    broken = original.clone()
    broken[77] = value
    assert reason(original, broken) == reason(broken, original) == "non-finite"


def test_two_recordings_are_no_pair(original: Tensor) -> None:
    assert reason(original, original[:-2_000]) == reason(original[:-2_000], original) == "lengths differ"


def test_what_pesq_cannot_score_raises_instead_of_counting_as_a_negative_number(original: Tensor) -> None:
    start = original.clone()
    start[800:] = 0
    pair = start.numpy(), original.numpy()
    assert pesq.pesq(RATE, *pair, "wb", on_error=pesq.PesqError.RETURN_VALUES) < 0
    assert reason(start, original) == "pesq failed"
    with pytest.raises(QualityError, match=r"PESQ gives no score: No utterances detected$"):
        speech_quality(start, original, RATE)


def test_a_batch_is_refused(original: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected waveforms float \[N\], got .* shape \(1, 32000\)"):
        speech_quality(original[None], original[None], RATE)


def test_the_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(QualityError("silent", "the original holds digital silence only")))
    assert (error.reason, str(error)) == ("silent", "the original holds digital silence only")


@pytest.mark.parametrize("package", ["pesq", "pystoi"])
def test_a_missing_package_is_named_with_the_remedy(
    original: Tensor, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'^{package} is needed .*pip install "speechllm\[eval\]"$'):
        speech_quality(original, original, RATE)


# ---- reconstructions


@pytest.mark.parametrize("codebooks, counts", [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])])
def test_powers_of_two_and_all_codebooks_are_compared(
    make_codec: Callable[..., SpeechCodec], codebooks: int, counts: list[int]
) -> None:
    assert layer_counts(make_codec(num_codebooks=codebooks)) == counts


def test_wanted_numbers_of_codebooks_are_sorted_and_checked(codec: SpeechCodec) -> None:
    assert layer_counts(codec, [3, 1, 3]) == [1, 3]
    for wanted in ([], [0], [1, 4], [-1]):
        with pytest.raises(InputError, match="layers must be numbers from 1 to 3"):
            layer_counts(codec, wanted)


def test_a_reconstruction_is_what_encoding_and_decoding_give(codec: SpeechCodec, original: Tensor) -> None:
    found = reconstruct(codec, original[:5_001], [1, 3])
    assert list(found) == [1, 3]
    for count, waveform in found.items():
        assert torch.equal(waveform, codec.decode(codec.encode(original[None, :5_001], layers=count))[0])
        assert waveform.shape == (5_001,)
