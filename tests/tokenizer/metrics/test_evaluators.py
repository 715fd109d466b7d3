"""Judges of voices and words: the same voice is 1, rates are matched, and only a recogniser judges words."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchaudio.functional import resample

from speechllm import QualityError, SpeechCodec, Transcripts
from tokenizer.loading import load_recognizer
from tokenizer.metrics.evaluators import recognized_text, speaker_embedding

RATE = 16_000


class Speaker(nn.Linear):
    """Hears the energies of the two halves."""

    def embedding(self, waveform: Tensor) -> Tensor:
        return waveform.reshape(len(waveform), 2, -1).square().sum(2)


class Judge:
    """Says how many samples it was given."""

    sample_rate, frame_rate, device = 8_000, 0.0, torch.device("cpu")

    def encode(self, waveform: Tensor) -> Transcripts:
        return Transcripts([str(waveform.shape[1])])


def test_a_voice_has_unit_length_at_any_level(noise: Callable[..., Tensor]) -> None:
    wave = noise(RATE)[0]
    voice = speaker_embedding(Speaker(1, 1), wave, RATE)
    energies = wave.reshape(2, -1).square().sum(1)
    torch.testing.assert_close(voice, energies / energies.norm())
    assert float(voice @ speaker_embedding(Speaker(1, 1), 0.1 * wave, RATE)) == pytest.approx(1)


def test_other_rates_are_heard_at_16_khz(noise: Callable[..., Tensor]) -> None:
    wave = noise(24_000)[0]
    expected = speaker_embedding(Speaker(1, 1), resample(wave, 24_000, RATE), RATE)
    torch.testing.assert_close(speaker_embedding(Speaker(1, 1), wave, 24_000), expected)


@pytest.mark.parametrize("wave, reason", [(torch.zeros(RATE), "silent"), (torch.ones(100), "too short")])
def test_what_holds_no_voice_is_refused(wave: Tensor, reason: str) -> None:
    with pytest.raises(QualityError) as caught:
        speaker_embedding(Speaker(1, 1), wave, RATE)
    assert caught.value.reason == reason


def test_the_judge_hears_at_its_own_rate(noise: Callable[..., Tensor]) -> None:
    assert recognized_text(Judge(), noise(RATE)[0], RATE) == "8000"


def test_only_what_gives_text_can_judge_words(monkeypatch: pytest.MonkeyPatch, codec: SpeechCodec) -> None:
    judges = {"recognizer:x": Judge(), "codec": codec}
    monkeypatch.setattr("tokenizer.loading.load_tokenizer", judges.get)
    assert load_recognizer("recognizer:x") is judges["recognizer:x"]
    with pytest.raises(ValueError, match="codec gives no text: a judge of words is a recogniser"):
        load_recognizer("codec")
