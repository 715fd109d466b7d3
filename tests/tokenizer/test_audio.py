"""Reading and writing recordings: exact samples, and an error with the reason for unusable files."""

import contextlib
import errno
import io
import os
import pickle
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from speechllm import AudioError, InputError, load_audio, pad_waveforms, save_audio
from tokenizer.audio import audio_duration, hash_recording, inspect_audio, open_parts, resample

RATE = 16_000
SPARSE = {"bitrate_mode": "VARIABLE", "compression_level": 0.9}  # frames that lean on those before them


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


# ---- files that are none, or not whole


def speech(seconds: float = 4.0) -> np.ndarray:
    """A tone whose pitch and level change, so that every second needs its own bytes."""
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * (300 + 200 * time) * time) * (1 + np.sin(9 * time)) / 2).astype("float32")


def encoded(kind: str, subtype: str | None = None, seconds: float = 4.0) -> bytearray:
    file = io.BytesIO()
    soundfile.write(file, speech(seconds), RATE, subtype, format=kind)
    return bytearray(file.getvalue())


def flac_stating(samples: int) -> bytearray:
    """A FLAC file of 4 s whose header states another number of samples; 0 is an unknown one."""
    content = encoded("FLAC")
    fields = int.from_bytes(content[18:26], "big")
    content[18:26] = (fields >> 36 << 36 | samples).to_bytes(8, "big")
    return content


def wav_stating(size: int) -> bytearray:
    """A WAV file of 4 s, 128000 bytes, whose header states another size."""
    content = encoded("WAV")
    content[40:44] = struct.pack("<I", size)
    return content


def wav_of_rate(rate: int) -> bytearray:
    content = encoded("WAV")
    content[24:28] = struct.pack("<I", rate)
    return content


def every_reason(path: Path) -> str:
    """The reason of `load_audio`, which `inspect_audio` gives too, for a file and for its content."""
    reason = reason_for(path)
    for source in (path, path.read_bytes()):
        with pytest.raises(AudioError, match="recording 7") as caught:
            inspect_audio(source, "recording 7")
        assert caught.value.reason == reason
    return reason


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "a.wav/b.wav"])
def test_a_name_of_no_file_is_missing(recording: Path, name: str) -> None:
    assert reason_for(recording.parent / name) == "missing"


def test_pipes_and_devices_are_no_files_and_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    assert reason_for(tmp_path / "pipe.wav") == reason_for(Path("/dev/zero")) == "missing"


@pytest.mark.parametrize(
    "error, reason",
    [
        (PermissionError(13, "Permission denied"), "unreadable"),
        (MemoryError(), "too long"),
        (RuntimeError("of a library"), "unreadable"),
    ],
)
def test_what_fails_while_reading_is_an_error_of_the_recording(
    recording: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    assert reason_for(recording) == reason


def test_a_socket_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("a.wav")
        assert reason_for(Path("a.wav")) == "missing"


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_what_fails_of_the_disk_is_no_error_of_the_recording(
    recording: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    class Failing(io.FileIO):
        def readinto(self, buffer: memoryview) -> int:
            return fail() if self.tell() > 16_000 else super().readinto(memoryview(buffer)[:4096])

    def raises(file: Path, *reads: Callable[[Path], object]) -> None:
        for read in reads:
            with pytest.raises(OSError, match=rf"{os.strerror(number)}.*{file}") as caught:
                read(file)
            assert caught.value.errno == number

    files = [recording.with_suffix(ending) for ending in (".flac", ".wav", ".ogg")]
    for file in files:
        save_audio(file, 0.1 * torch.randn(160_000))
    with monkeypatch.context() as patch:
        patch.setattr("tokenizer.audio.io.FileIO", Failing)
        for file in files:
            raises(file, load_audio, inspect_audio, hash_recording)
    monkeypatch.setattr("tokenizer.audio._open_at_once", fail)
    raises(recording, load_audio, inspect_audio, audio_duration, hash_recording)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_unreadable(recording: Path) -> None:
    recording.chmod(0)
    assert reason_for(recording) == "unreadable"


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(AudioError("a.wav", "empty", "holds no samples")))
    assert (str(error), error.reason) == ("a.wav: holds no samples", "empty")


def test_the_content_counts_not_the_ending(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(encoded("WAV"))
    assert len(load_audio(tmp_path / "a.raw")) == 4 * RATE
    (tmp_path / "b.raw").write_bytes(encoded("WAV")[44:])
    assert every_reason(tmp_path / "b.raw") == "unreadable"


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xe9.wav"
    with open(name, "wb") as file:
        file.write(encoded("WAV"))
    assert len(load_audio(os.fsdecode(name))) == 4 * RATE


def test_a_flac_file_without_number_of_samples_is_read_to_its_end(tmp_path: Path, recording: Path) -> None:
    (tmp_path / "a.flac").write_bytes(flac_stating(0))
    (tmp_path / "b.flac").write_bytes(encoded("FLAC"))
    assert torch.equal(load_audio(tmp_path / "a.flac"), load_audio(tmp_path / "b.flac"))
    assert torch.equal(load_audio(tmp_path / "a.flac", start_s=3.0), load_audio(tmp_path / "b.flac", start_s=3.0))
    assert audio_duration(tmp_path / "a.flac") == inspect_audio(tmp_path / "a.flac").duration_s == 4
    assert reason_for(tmp_path / "a.flac", max_duration_s=3.9) == "too long"
    assert len(load_audio(tmp_path / "a.flac", max_duration_s=4.0)) == 4 * RATE


def test_samples_are_counted_as_far_as_they_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.audio.BLOCK", RATE // 2)
    (tmp_path / "a.flac").write_bytes(flac_stating(0))
    assert [audio_duration(tmp_path / "a.flac", most_s) for most_s in (1.0, 4.0, 9.0)] == [1.5, 4, 4]


@pytest.mark.parametrize("samples", [5 * RATE, 2**36 - 1])
def test_a_flac_file_of_fewer_samples_than_its_header_states_is_truncated(tmp_path: Path, samples: int) -> None:
    (tmp_path / "a.flac").write_bytes(flac_stating(samples))
    assert every_reason(tmp_path / "a.flac") == "truncated"
    assert reason_for(tmp_path / "a.flac", max_duration_s=60) == "truncated"  # by what there is, not by the header
    assert audio_duration(tmp_path / "a.flac") == (5 if samples == 5 * RATE else 4)  # counted, where it cannot be true


@pytest.mark.parametrize("samples", [1, RATE, 2 * RATE])
def test_a_flac_file_of_more_samples_than_its_header_states_is_not_used(tmp_path: Path, samples: int) -> None:
    (tmp_path / "a.flac").write_bytes(flac_stating(samples))
    assert every_reason(tmp_path / "a.flac") == "truncated"
    (tmp_path / "a.flac").write_bytes(flac_stating(4 * RATE - 1000))
    assert torch.equal(
        load_audio(tmp_path / "a.flac"),
        torch.from_numpy(soundfile.read(io.BytesIO(encoded("FLAC")), dtype="float32")[0]),
    )


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_wav_file_of_more_samples_than_its_header_states_is_not_used(tmp_path: Path, subtype: str) -> None:
    content = encoded("WAV", subtype)
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", struct.unpack("<I", content[place : place + 4])[0] // 2)
    (tmp_path / "a.wav").write_bytes(content)
    assert every_reason(tmp_path / "a.wav") == "truncated"


def test_what_follows_the_container_of_a_wav_file_is_no_sound(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("WAV") + b"\xff\x00TAG" * 5000)
    assert len(load_audio(tmp_path / "a.wav")) == 4 * RATE


def mp3(seconds: float, mode: str = "VARIABLE") -> bytes:
    """Noise, then next to nothing, so that a variable bit rate varies; its first frame states the samples (Xing)."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * RATE)).astype("float32")
    samples[len(samples) // 4 :] *= 0.001
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="MP3", bitrate_mode=mode, compression_level=0.3)
    return file.getvalue()


def uncounted(content: bytes, way: str) -> bytes:
    """The same MP3 without the frame that states the samples, or with one that says 0 or says it as VBRI does."""
    place, end = max(content.find(b"Xing"), content.find(b"Info")), content.index(content[:2], 4)
    assert 0 < place < end
    size = content[place + 12 : place + 16]
    first = {
        "not": b"",
        "zero": content[: place + 8] + bytes(8) + content[place + 16 : end],
        "VBRI": content[:4] + bytes(32) + b"VBRI\0\1\0\0\0\0" + size + b"\0\0\1\0" + bytes(end - 54),
    }
    return first[way] + content[end:]


@pytest.mark.parametrize("way", ["not", "zero", "VBRI"])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\x02\x10" + bytes(272)], ids=["plain", "tagged"])
def test_an_mp3_file_that_states_no_samples_is_read_to_its_end(tmp_path: Path, mode: str, tag: bytes, way: str) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(tag + uncounted(mp3(12.0, mode), way))
    for seconds in (len(load_audio(path)) / RATE, audio_duration(path), inspect_audio(path.read_bytes()).duration_s):
        assert seconds == pytest.approx(12.0, abs=0.15)
    assert len(load_audio(path, start_s=10.0)) / RATE == pytest.approx(2.0, abs=0.15)
    assert len(load_audio(path, start_s=5.0, duration_s=3.0)) == 3 * RATE
    assert reason_for(path, max_duration_s=11.0) == "too long"


@pytest.mark.parametrize("between", [b"", b"ID3\x04\0\0\0\0\x02\x10" + bytes(272)], ids=["plain", "tagged"])
def test_joined_mp3_files_are_not_used_in_part(tmp_path: Path, between: bytes) -> None:
    (tmp_path / "a.mp3").write_bytes(mp3(2.0) + between + mp3(2.0))
    assert every_reason(tmp_path / "a.mp3") == "truncated"
    (tmp_path / "b.mp3").write_bytes(mp3(2.0) + b"TAG" + bytes(125))  # what many players write behind it
    assert len(load_audio(tmp_path / "b.mp3")) == 2 * RATE
    content = bytearray(mp3(2.0))
    place = max(content.find(b"Xing"), content.find(b"Info")) + 12
    content[place : place + 4] = struct.pack(">I", content.rindex(content[:2]))  # bytes, without the last frame
    (tmp_path / "c.mp3").write_bytes(content)
    assert len(load_audio(tmp_path / "c.mp3")) == 2 * RATE


TRUNCATED = [
    *(("WAV", subtype) for subtype in ("PCM_16", "FLOAT", "IMA_ADPCM", "ULAW")),
    *(("AIFF", None), ("AU", None), ("W64", None), ("RF64", None), ("NIST", None)),
    *(("MP3", None), ("OGG", "OPUS"), ("OGG", "VORBIS"), ("FLAC", None), ("CAF", None)),
]


@pytest.mark.parametrize("kind, subtype", TRUNCATED)
def test_a_truncated_file_is_not_used(tmp_path: Path, kind: str, subtype: str | None) -> None:
    content = encoded(kind, subtype, 8.0)
    (tmp_path / "a").write_bytes(content)
    assert len(load_audio(tmp_path / "a")) == pytest.approx(8 * RATE, abs=0.05 * RATE)
    for share in (0.5, 0.9):
        (tmp_path / "b").write_bytes(content[: int(share * len(content))])
        assert every_reason(tmp_path / "b") == ("unreadable" if kind in ("FLAC", "CAF") else "truncated")


def test_an_ogg_file_cut_between_two_pages_is_truncated(tmp_path: Path) -> None:
    content = encoded("OGG", "OPUS", 8.0)
    (tmp_path / "a.opus").write_bytes(content[: content.rindex(b"OggS")])
    assert every_reason(tmp_path / "a.opus") == "truncated"


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_file_that_was_written_into_a_pipe_is_whole(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.wav").write_bytes(wav_stating(size))
    assert len(load_audio(tmp_path / "a.wav")) == 4 * RATE


def test_a_wav_file_that_lacks_a_few_bytes_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav_stating(128_100))
    assert len(load_audio(tmp_path / "a.wav")) == 4 * RATE
    (tmp_path / "a.wav").write_bytes(wav_stating(160_000))
    assert every_reason(tmp_path / "a.wav") == "truncated"


# ---- values that no recording has


def written(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> Path:
    soundfile.write(path / "a.wav", samples, rate, subtype)
    return path / "a.wav"


@pytest.mark.parametrize("peak", [4.5, 127.0, 32_767.0, 4.5e29])
def test_samples_in_other_units_are_out_of_range(tmp_path: Path, peak: float) -> None:
    file = written(tmp_path, peak * tone(440, 1) / 0.5)
    assert every_reason(file) == "out of range"
    with pytest.raises(AudioError, match=r"has a peak of .* divide them by their full scale, 32768 for 16-bit integ"):
        load_audio(file, duration_s=0.5)


def test_a_double_beyond_float32_is_non_finite(tmp_path: Path) -> None:
    assert every_reason(written(tmp_path, 1e300 * tone(440, 1).astype("float64"), subtype="DOUBLE")) == "non-finite"


def test_peaks_a_little_above_full_scale_are_clipped(tmp_path: Path) -> None:
    loud = 3 * tone(440, 1)
    torch.testing.assert_close(load_audio(written(tmp_path, loud)), torch.from_numpy(loud).clamp(-1, 1))


@pytest.mark.parametrize("rate", [RATE, 48_000])
@pytest.mark.parametrize("level", [0.0, 0.3, -0.9])
def test_a_constant_is_silent(tmp_path: Path, rate: int, level: float) -> None:
    assert every_reason(written(tmp_path, np.full(rate, level, "float32"), rate)) == "silent"


def test_near_silence_is_silent(tmp_path: Path) -> None:
    assert every_reason(written(tmp_path, 1e-6 * tone(440, 1))) == "silent"


@pytest.mark.parametrize("gain", [-1.0, -0.97])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_of_channels_that_cancel_each_other_the_loudest_is_taken(tmp_path: Path, rate: int, gain: float) -> None:
    left = tone(440, 1, rate)
    stereo = np.stack([left, gain * left], 1)
    file = written(tmp_path, stereo, rate, "PCM_16")
    found = load_audio(file)
    torch.testing.assert_close(found, resample(torch.from_numpy(left), rate, RATE), atol=1e-3, rtol=0)
    assert inspect_audio(file).duration_s == 1
    torch.testing.assert_close(load_audio(file, duration_s=0.5)[:7_000], found[:7_000], atol=1e-3, rtol=0)


def test_channels_that_are_not_opposite_are_averaged_however_many(tmp_path: Path) -> None:
    channels = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 12)).astype("float32")
    channels[:, 3] = 0
    found = load_audio(written(tmp_path, channels))
    np.testing.assert_allclose(found.numpy(), channels.mean(1), atol=1e-6)


@pytest.mark.parametrize("count", [64, 65])
def test_so_many_channels_can_be_read_and_no_more(tmp_path: Path, count: int) -> None:
    recording = written(tmp_path, np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, count)).astype("float32"))
    if count > 64:
        assert every_reason(recording) == "channels"
    else:
        assert len(load_audio(recording)) == RATE


# ---- sample rates


@pytest.mark.parametrize("rate", [1, 1_999, 1_000_001, 2**31 - 1, 2**31])
def test_a_rate_of_no_recording_is_refused(tmp_path: Path, rate: int) -> None:
    (tmp_path / "a.wav").write_bytes(wav_of_rate(rate))
    assert every_reason(tmp_path / "a.wav") == ("unreadable" if rate >= 2**31 else "sample rate")


@pytest.mark.parametrize("rate", [2_000, 8_000, 11_025, 11_127, 15_999, 22_050, 24_000, 44_101, 48_000, 999_983])
def test_a_tone_keeps_level_and_phase_at_any_rate(rate: int) -> None:
    samples = rate + 7
    found = resample(torch.from_numpy(tone(440, samples / rate, rate)), rate, RATE)
    assert found.dtype == torch.float32 and len(found) == -(-samples * RATE // rate)
    expected = torch.from_numpy(tone(440, len(found) / RATE))
    torch.testing.assert_close(found[2_000:-2_000], expected[2_000:-2_000], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rate", [24_000, 44_100, 48_000])
def test_what_lies_above_half_the_new_rate_is_gone_and_what_lies_below_is_kept(rate: int) -> None:
    below, above = (resample(torch.from_numpy(tone(f, 1, rate)), rate, RATE)[1_000:-1_000] for f in (7_000, 9_000))
    assert below.abs().max() == pytest.approx(0.5, abs=2e-3) and above.abs().max() < 1e-5


def test_a_long_recording_is_resampled_in_blocks_as_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, np.random.default_rng(0).uniform(-0.5, 0.5, 30_000).astype("float32"), 44_101)
    whole = load_audio(file)
    monkeypatch.setattr("tokenizer.audio.BLOCK", 1_000)
    assert torch.equal(load_audio(file), whole)


def test_reading_asks_for_no_more_than_a_block_whatever_the_header_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, *a, **k: asked.append(n) or read(self, n, *a, **k))
    for samples in (0, 2**36 - 1):
        (tmp_path / "a.flac").write_bytes(flac_stating(samples))
        for part in ({}, {"duration_s": 1e9}):
            with contextlib.suppress(AudioError):
                load_audio(tmp_path / "a.flac", **part)
    assert max(asked) <= 2**18


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


KINDS = [("WAV", {}), ("FLAC", {}), ("OGG", {}), ("OGG", {"subtype": "OPUS"}), ("MP3", {}), ("MP3", SPARSE)]


@pytest.mark.parametrize("kind, options", KINDS)
def test_parts_are_slices_of_the_whole_in_every_format(
    tmp_path: Path, kind: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder may need what is before a part (MP3 at low rates), or miss its place (Vorbis near the end)."""
    path = tmp_path / f"a.{kind.lower()}"
    monkeypatch.setattr("tokenizer.audio.END_S", 2.5)
    soundfile.write(path, np.concatenate([tone(440, 3), speech(3.0)]), RATE, format=kind, **options)
    whole = load_audio(path)
    with open_parts(path) as part:
        for start_s in (0.0, 0.7, 0.7, 1.3, 2.5, 4.0, 5.7):
            expected = whole[round(start_s * RATE) :][:RATE]
            anew = load_audio(path, start_s=start_s, duration_s=1.0)
            torch.testing.assert_close(anew, expected, atol=1e-3 if options.get("subtype") else 1e-5, rtol=0)
            torch.testing.assert_close(part(start_s, 1.0), expected, atol=1e-5, rtol=0)
        with pytest.raises(AudioError, match="holds no samples"):
            part(6.5, 1.0)


def test_parts_of_an_open_recording_are_resampled_and_of_the_loudest_channel(tmp_path: Path) -> None:
    sound = np.stack([tone(440, 2, 22_050), -0.9 * tone(440, 2, 22_050)], 1)  # opposite phases
    sound[22_050:, 1] = tone(333, 1, 22_050)
    soundfile.write(tmp_path / "a.wav", sound, 22_050)
    with open_parts(tmp_path / "a.wav") as part:
        for start_s in (0.0, 0.5, 1.2):
            anew = load_audio(tmp_path / "a.wav", start_s=start_s, duration_s=0.5)
            torch.testing.assert_close(part(start_s, 0.5), anew, atol=1e-6, rtol=0)


def test_what_is_done_with_a_part_is_no_fault_of_the_recording(recording: Path) -> None:
    with pytest.raises(ValueError, match="mine") as caught, open_parts(recording):
        raise ValueError("mine")
    assert not isinstance(caught.value, AudioError)
    with pytest.raises(AudioError), open_parts(recording.with_name("none.wav")):
        pass


def test_a_part_is_not_held_to_the_limit_of_the_whole(recording: Path) -> None:
    assert load_audio(recording, duration_s=0.5, max_duration_s=0.6).shape == (8_000,)


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_what_is_saved_is_read_again_up_to_16_bits(tmp_path: Path, ending: str) -> None:
    waveform = torch.linspace(-1, 1, 5_000)
    path = tmp_path / "new" / "folder" / f"a.{ending}"
    save_audio(path, waveform.requires_grad_())
    assert soundfile.info(path).subtype == "PCM_16"
    torch.testing.assert_close(load_audio(path), waveform.detach(), atol=2 / 32768, rtol=0)


def test_minutes_are_saved_as_ogg(tmp_path: Path) -> None:
    """Vorbis's encoder cannot take them at once."""
    save_audio(tmp_path / "a.ogg", torch.from_numpy(np.tile(tone(440, 1), 190)))
    assert soundfile.info(tmp_path / "a.ogg").frames == 190 * RATE


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

    def fail(path: Path, content: bytes) -> None:
        path.write_text("half a file")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        save_audio(tmp_path / "a.wav", torch.zeros(10))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert (tmp_path / "a.wav").read_bytes() == before


def test_padding_puts_zeros_behind_and_counts_samples() -> None:
    waveforms, lengths = pad_waveforms([torch.ones(2), torch.ones(4), torch.ones(1)])
    assert waveforms.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert lengths.tolist() == [2, 4, 1]
    assert lengths.dtype == torch.long
