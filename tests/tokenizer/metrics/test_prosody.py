"""Distortion and pitch correlation: alignment by hand and by trying all paths, cepstra by their definition, bounds."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from speechllm import QualityError
from tokenizer.metrics.prosody import (
    VoiceFrames,
    align_voices,
    dtw,
    mel_cepstra,
    mel_cepstral_distortion,
    pitch_correlation,
    voice_frames,
)

pytestmark = pytest.mark.numeric

pytest.importorskip("pyworld")

RATE = 16_000
DB = 10 / np.log(10) * np.sqrt(2)


def vowel(duration_s: float = 1.2, pitch: float = 1.0, silence_s: float = 0.0) -> Tensor:
    """A voice whose two formants and pitch move from the beginning to the end, however long it is: float [N]."""
    time = np.linspace(0, 1, round(duration_s * RATE))
    f0 = pitch * (130 + 40 * np.sin(2 * np.pi * time))
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    wave = np.zeros(len(time))
    for harmonic in range(1, 40):
        frequency = harmonic * f0
        formants = 1 / (1 + ((frequency - 500 - 300 * time) / 100) ** 2) + 0.4 / (
            1 + ((frequency - 2_200 + 900 * time) / 150) ** 2
        )
        wave += np.where(frequency < RATE / 2, formants, 0) * np.sin(harmonic * phase)
    return torch.nn.functional.pad(torch.from_numpy(0.1 * wave).float(), 2 * [round(silence_s * RATE)])


def distortion(converted: VoiceFrames, reference: VoiceFrames) -> float:
    return mel_cepstral_distortion(align_voices(converted, reference))


def correlation(converted: VoiceFrames, reference: VoiceFrames) -> float:
    return pitch_correlation(align_voices(converted, reference))


@pytest.fixture(scope="module")
def voice() -> VoiceFrames:
    return voice_frames(vowel(), RATE)


# ---- alignment


def test_the_cheapest_path_is_the_one_found_by_hand() -> None:
    cost = np.array([[1.0, 3, 9, 9], [9, 1, 1, 4], [9, 8, 5, 1]])
    rows, columns = dtw(cost)
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 1, 2], [0, 1, 2, 3])
    rows, columns = dtw(np.array([[1.0, 5], [0, 5], [2, 3], [9, 1]]))
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 2, 3], [0, 0, 0, 1])  # 1 + 0 + 2 + 1


def cheapest(cost: np.ndarray) -> float:
    """By trying every path."""
    if cost.shape == (1, 1):
        return cost[0, 0]
    rest = [cost[i:, j:] for i, j in ((1, 1), (1, 0), (0, 1)) if i < cost.shape[0] and j < cost.shape[1]]
    return cost[0, 0] + min(map(cheapest, rest))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 6), (6, 4), (5, 5)])
def test_no_path_is_cheaper(shape: tuple[int, int]) -> None:
    cost = np.random.default_rng(0).random(shape)
    rows, columns = dtw(cost)
    assert cost[rows, columns].sum() == pytest.approx(cheapest(cost))
    steps = set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True))
    assert steps <= {(1, 1), (1, 0), (0, 1)}
    assert (rows[0], columns[0]) == (0, 0) and (rows[-1] + 1, columns[-1] + 1) == shape


# ---- mel-cepstra


def test_mel_cepstra_are_the_coefficients_over_the_warped_frequency() -> None:
    generator = np.random.default_rng(0)
    wanted = generator.normal(size=(3, 24)) / np.arange(1, 25)
    plain = np.linspace(0, np.pi, 513)
    z = np.exp(1j * plain)
    warped = -np.unwrap(np.angle((1 / z - 0.42) / (1 - 0.42 / z)))  # phase of the all-pass
    order = np.arange(1, 25)
    log_magnitude = 0.7 + wanted @ np.cos(order[:, None] * warped)
    np.testing.assert_allclose(mel_cepstra(np.exp(2 * log_magnitude)), wanted, atol=2e-3)


# ---- distortion and correlation


def frames(first: list[float], f0: np.ndarray | None = None) -> VoiceFrames:
    """Frames that differ in c1 only."""
    cepstra = np.zeros((len(first), 24))
    cepstra[:, 0] = first
    return VoiceFrames(cepstra, np.zeros(len(first)) if f0 is None else f0)


def test_distortion_is_that_of_the_formula() -> None:
    assert distortion(frames([0, 1, 2]), frames([0, 1, 2.5])) == pytest.approx(DB * 0.5 / 3)
    assert distortion(frames([0, 0, 1, 2, 2]), frames([0, 1, 1, 1, 2])) == 0  # the same, only slower
    assert pytest.approx(6.14185, abs=1e-5) == DB


def test_aligned_frames_have_the_same_content() -> None:
    slow, fast = frames([0, 0, 1, 2, 2], np.arange(5.0)), frames([0, 1, 1, 1, 2], np.arange(5.0))
    a, b = align_voices(slow, fast)
    assert a.cepstra[:, 0].tolist() == b.cepstra[:, 0].tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert (a.f0.tolist(), b.f0.tolist()) == ([0, 1, 2, 2, 2, 3, 4], [0, 0, 1, 2, 3, 4, 4])


def test_a_voice_is_its_own_bound(voice: VoiceFrames) -> None:
    assert distortion(voice, voice) == 0
    assert correlation(voice, voice) == pytest.approx(1)


@pytest.mark.parametrize(
    "other", [{"duration_s": 1.5}, {"duration_s": 0.9}, {"silence_s": 0.3}], ids=["slower", "faster", "later"]
)
def test_another_timing_is_no_other_voice(voice: VoiceFrames, other: dict) -> None:
    retimed = voice_frames(vowel(**other), RATE)
    assert distortion(retimed, voice) < 1
    assert correlation(retimed, voice) > 0.98


def test_other_formants_are_another_voice(voice: VoiceFrames) -> None:
    """Played a fifth faster, formants and pitch are higher."""
    wave = vowel(1.5)
    higher = torch.nn.functional.interpolate(wave[None, None], scale_factor=0.8)[0, 0]
    assert distortion(voice_frames(higher, RATE), voice) > 3


def test_a_higher_pitch_of_the_same_melody_correlates_fully(voice: VoiceFrames) -> None:
    assert correlation(VoiceFrames(voice.cepstra, 1.25 * voice.f0), voice) == pytest.approx(1)


def test_a_mirrored_melody_correlates_negatively() -> None:
    log = np.sin(np.linspace(0, 6, 50))
    up, down = (frames(list(range(50)), 150 * np.exp(sign * log)) for sign in (0.2, -0.1))
    assert correlation(up, down) == pytest.approx(-1)


def test_pitch_is_compared_where_both_are_voiced() -> None:
    """Reference by hand over the frames 10 to 39, which are voiced in both."""
    generator = np.random.default_rng(0)
    a, b = 100 + 50 * generator.random((2, 50))
    a[:10], b[40:] = 0, 0
    expected = np.corrcoef(np.log(a[10:40]), np.log(b[10:40]))[0, 1]
    found = correlation(frames(list(range(50)), a), frames(list(range(50)), b))
    assert found == pytest.approx(expected) and abs(found) < 0.9


def test_the_level_and_the_rate_do_not_matter(voice: VoiceFrames) -> None:
    assert distortion(voice_frames(0.1 * vowel(), RATE), voice) < 0.1
    from torchaudio.functional import resample

    assert distortion(voice_frames(resample(vowel(), RATE, 24_000), 24_000), voice) < 1


def test_the_pitch_is_that_of_the_voice(voice: VoiceFrames) -> None:
    assert voice.f0.max() == pytest.approx(170, rel=0.02) and (voice.f0 > 0).mean() > 0.9
    assert voice.cepstra.shape == (len(voice.f0), 24) and len(voice.f0) == pytest.approx(1.2 / 0.005, abs=3)


# ---- recordings without a score


@pytest.mark.parametrize(
    "waveform, reason",
    [(torch.zeros(RATE), "silent"), (torch.ones(3_999), "too short"), (torch.full((RATE,), torch.nan), "non-finite")],
)
def test_what_holds_no_speech_has_no_frames(waveform: Tensor, reason: str) -> None:
    with pytest.raises(QualityError) as caught:
        voice_frames(waveform, RATE)
    assert caught.value.reason == reason


def test_noise_has_no_pitch(voice: VoiceFrames, noise: Callable[..., Tensor]) -> None:
    rushing = voice_frames(noise(RATE)[0], RATE)
    assert distortion(rushing, voice) > 3
    with pytest.raises(QualityError, match="frames are voiced in both recordings, 20 are needed") as caught:
        correlation(rushing, voice)
    assert caught.value.reason == "unvoiced"


def test_a_constant_pitch_has_no_correlation() -> None:
    flat, moving = frames(list(range(50)), np.full(50, 100.0)), frames(list(range(50)), np.arange(50) + 100.0)
    with pytest.raises(QualityError) as caught:
        correlation(flat, moving)
    assert caught.value.reason == "constant pitch"


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyworld", None)
    with pytest.raises(ImportError, match=r'^pyworld is needed .*pip install "speechllm\[eval\]"$'):
        voice_frames(vowel(), RATE)
