"""Reading and writing recordings: exact samples, and an error with the reason for unusable files."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from speechllm import AudioError, InputError, load_audio, pad_waveforms, save_audio

RATE = 16_000


def tone(frequency: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype("float32")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, RATE).astype("float32"), RATE, "FLOAT")
    return path


def reason_for(path: Path, **options: float) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(path, **options)
    assert str(path) in str(caught.value)
    return caught.value.reason


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    assert reason_for(tmp_path / "none.wav") == "missing"


def test_a_folder_is_a_missing_file(tmp_path: Path) -> None:
    assert reason_for(tmp_path) == "missing"


@pytest.mark.parametrize("content", [b"", b"this is a text, not a sound", bytes(5000)])
def test_what_is_no_audio_is_unreadable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    assert reason_for(tmp_path / "a.wav") == "unreadable"


def test_half_a_flac_is_unreadable(tmp_path: Path, recording: Path) -> None:
    save_audio(tmp_path / "a.flac", load_audio(recording))
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(content[: len(content) // 2])
    assert reason_for(tmp_path / "half.flac") == "unreadable"


def test_a_file_without_samples_is_empty(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0, "float32"), RATE)
    assert reason_for(tmp_path / "a.wav") == "empty"


def test_a_part_behind_the_end_is_empty(recording: Path) -> None:
    assert reason_for(recording, start_s=1.0, duration_s=0.1) == "empty"
    assert reason_for(recording, start_s=50.0) == "empty"


def test_a_file_above_the_limit_is_too_long_and_both_durations_are_reported(recording: Path) -> None:
    assert reason_for(recording, max_duration_s=0.9) == "too long"
    with pytest.raises(AudioError, match=r"1\.0 s long, at most 0\.9 s"):
        load_audio(recording, max_duration_s=0.9)
    assert load_audio(recording, max_duration_s=1.0).shape == (RATE,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_sample_without_a_value_is_non_finite(tmp_path: Path, value: float) -> None:
    samples = tone(440, 0.1)
    samples[77] = value
    soundfile.write(tmp_path / "a.wav", samples, RATE, "FLOAT")
    assert reason_for(tmp_path / "a.wav") == "non-finite"


def test_a_recording_of_nothing_is_silent(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE, "float32"), RATE)
    assert reason_for(tmp_path / "a.wav") == "silent"


def test_a_quiet_recording_is_not_silent(tmp_path: Path) -> None:
    samples = np.zeros(RATE, "int16")
    samples[5] = 1
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    assert load_audio(tmp_path / "a.wav").abs().max() == 1 / 32768


def test_a_silent_part_of_a_recording_is_given(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.concatenate([np.zeros(RATE), tone(440, 1)]), RATE)
    assert torch.equal(load_audio(tmp_path / "a.wav", duration_s=0.5), torch.zeros(RATE // 2))


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(300, 0.1), tone(500, 0.1) / 2
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), RATE, "FLOAT")
    waveform = load_audio(tmp_path / "a.wav")
    assert waveform.dtype == torch.float32
    np.testing.assert_allclose(waveform.numpy(), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_resampling_keeps_duration_frequency_and_level(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1_000, 1.0, rate), rate, "FLOAT")
    waveform = load_audio(tmp_path / "a.wav", RATE)
    assert len(waveform) == RATE
    spectrum = torch.fft.rfft(waveform).abs()
    assert int(spectrum.argmax()) == 1_000  # one second: bin n is n Hz
    assert waveform[2_000:-2_000].abs().max() == pytest.approx(0.5, abs=0.01)


def test_a_part_equals_the_slice_of_the_whole(recording: Path) -> None:
    whole = load_audio(recording)
    assert torch.equal(load_audio(recording, start_s=0.25), whole[4_000:])
    assert torch.equal(load_audio(recording, duration_s=0.5), whole[:8_000])
    assert torch.equal(load_audio(recording, start_s=0.25, duration_s=0.5), whole[4_000:12_000])
    assert torch.equal(load_audio(recording, start_s=0.75, duration_s=0.5), whole[12_000:])


def test_a_part_is_not_held_to_the_limit_of_the_whole(recording: Path) -> None:
    assert load_audio(recording, duration_s=0.5, max_duration_s=0.6).shape == (8_000,)


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_what_is_saved_is_read_again_up_to_16_bits(tmp_path: Path, ending: str) -> None:
    waveform = torch.linspace(-1, 1, 5_000)
    path = tmp_path / "new" / "folder" / f"a.{ending}"
    save_audio(path, waveform.requires_grad_())
    assert soundfile.info(path).subtype == "PCM_16"
    torch.testing.assert_close(load_audio(path), waveform.detach(), atol=2 / 32768, rtol=0)


def test_a_second_save_gives_the_same_file_again(tmp_path: Path) -> None:
    """16-bit values survive reading and writing: no drift from copy to copy."""
    save_audio(tmp_path / "a.flac", torch.linspace(-0.9, 0.9, 1_000))
    once = load_audio(tmp_path / "a.flac")
    save_audio(tmp_path / "b.flac", once)
    torch.testing.assert_close(load_audio(tmp_path / "b.flac"), once, atol=1 / 32768, rtol=0)


def test_samples_above_full_scale_are_clipped_not_wrapped(tmp_path: Path) -> None:
    save_audio(tmp_path / "a.wav", torch.tensor([-3.0, 0.0, 3.0]))
    torch.testing.assert_close(load_audio(tmp_path / "a.wav"), torch.tensor([-1.0, 0.0, 1.0]), atol=1e-4, rtol=0)


def test_the_rate_is_saved(tmp_path: Path) -> None:
    save_audio(tmp_path / "a.wav", torch.zeros(240), 24_000)
    assert soundfile.info(tmp_path / "a.wav").samplerate == 24_000


def test_a_failed_save_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a.unknown: expected the name of an audio file, ending in .wav"):
        save_audio(tmp_path / "a.unknown", torch.zeros(10))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_audio(tmp_path / "a.wav", torch.ones(10))
    before = (tmp_path / "a.wav").read_bytes()

    def fail(path: str, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("no space left")

    monkeypatch.setattr(soundfile, "write", fail)
    with pytest.raises(OSError, match="no space left"):
        save_audio(tmp_path / "a.wav", torch.zeros(10))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert (tmp_path / "a.wav").read_bytes() == before


def test_padding_puts_zeros_behind_and_counts_samples() -> None:
    waveforms, lengths = pad_waveforms([torch.ones(2), torch.ones(4), torch.ones(1)])
    assert waveforms.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert lengths.tolist() == [2, 4, 1]
    assert lengths.dtype == torch.long
