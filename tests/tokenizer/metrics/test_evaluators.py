"""Evaluators: speaker embeddings have unit length, rates are matched, and only recognisers evaluate words."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from speechllm import QualityError, SpeechCodec, TokenizerError, Transcripts
from tokenizer.audio import resample
from tokenizer.loading import load_recognizer
from tokenizer.metrics.evaluators import recognized_text, speaker_embedding

RATE = 16_000


class Speaker(nn.Linear):
    """Embeds the energies of the two halves."""

    def embedding(self, waveform: Tensor) -> Tensor:
        return waveform.reshape(len(waveform), 2, -1).square().sum(2)


class SampleCounter:
    """A recogniser whose text is the number of samples."""

    sample_rate, frame_rate, device = 8_000, 0.0, torch.device("cpu")

    def encode(self, waveform: Tensor) -> Transcripts:
        return Transcripts([str(waveform.shape[1])])


def test_a_speaker_embedding_has_unit_length_at_any_level(noise: Callable[..., Tensor]) -> None:
    wave = noise(RATE)[0]
    embedding = speaker_embedding(Speaker(1, 1), wave, RATE)
    energies = wave.reshape(2, -1).square().sum(1)
    torch.testing.assert_close(embedding, energies / energies.norm())
    assert float(embedding @ speaker_embedding(Speaker(1, 1), 0.1 * wave, RATE)) == pytest.approx(1)


def test_other_rates_are_embedded_at_16_khz(noise: Callable[..., Tensor]) -> None:
    wave = noise(24_000)[0]
    expected = speaker_embedding(Speaker(1, 1), resample(wave, 24_000, RATE), RATE)
    torch.testing.assert_close(speaker_embedding(Speaker(1, 1), wave, 24_000), expected)


@pytest.mark.parametrize("wave, reason", [(torch.zeros(RATE), "silent"), (torch.ones(100), "too short")])
def test_recordings_without_speech_are_refused(wave: Tensor, reason: str) -> None:
    with pytest.raises(QualityError) as caught:
        speaker_embedding(Speaker(1, 1), wave, RATE)
    assert caught.value.reason == reason


def test_the_recogniser_receives_its_own_rate(noise: Callable[..., Tensor]) -> None:
    assert recognized_text(SampleCounter(), noise(RATE)[0], RATE) == "8000"
    assert recognized_text(SampleCounter(), torch.full([RATE], torch.nan), RATE) == "8000"


def test_only_what_returns_text_is_a_recogniser(monkeypatch: pytest.MonkeyPatch, codec: SpeechCodec) -> None:
    tokenizers = {"recognizer:x": SampleCounter(), "codec": codec}
    monkeypatch.setattr("tokenizer.loading.load_tokenizer", tokenizers.get)
    assert load_recognizer("recognizer:x") is tokenizers["recognizer:x"]
    with pytest.raises(TokenizerError, match="codec gives no text: choose a speech recogniser"):
        load_recognizer("codec")
