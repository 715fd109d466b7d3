"""Reading and writing audio files as float waveforms, with one clear error for every file that cannot be used."""

import contextlib
import errno
import functools
import hashlib
import io
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.files import atomic_file
from tokenizer.headers import UNKNOWN, Mp3, Stretched, Uncounted, Watched, is_cut_ogg, missing_s, unstated_s

SILENCE_PEAK = 1e-6  # below this peak a recording holds digital silence: nothing was recorded
LOUDEST_PEAK = 4.0  # above this peak the samples of a float file are in other units than [-1, 1]
RATES = range(2_000, 1_000_001)  # Hz; of a recording of speech
CHANNELS = 64  # at most; half a minute of them is held in memory
CANCELLED = 0.01  # share of the channels' energy below which their average is what is left of opposite phases
HEADER_TOLERANCE_S = 0.1  # a decoder may lose part of a frame at the end
BLOCK = 2**18  # samples read at a time
LEAD_S = 1.0  # of an MP3 that is read before a part: its frames refer back 511 bytes, half a second at 8 kbit/s
END_S = 10.0  # of a Vorbis file, which is read from there on
DENSEST = 100  # samples a byte: headers that state more are not believed
COUNTED = 2**18  # recordings whose counted lengths are kept
NO_FILE = errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO  # last: a socket


class AudioError(InputError):
    """A recording that cannot be used; `reason` is one or two words, for counting skipped recordings."""

    def __init__(self, path: str | Path, reason: str, detail: str):
        super().__init__(path, reason, detail)  # all, so that the error can be pickled
        self.path, self.reason, self.detail = path, reason, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


@dataclass(frozen=True)
class AudioInfo:
    """A recording that was read through: its length in s and its format, such as FLAC, as soundfile names it."""

    duration_s: float
    format: str


def load_audio(
    path: str | Path,
    sample_rate: int = 16_000,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
    max_duration_s: float | None = None,
) -> Tensor:
    """Read a recording as a mono waveform, float32 [N] in [-1, 1], at `sample_rate` Hz.

    Reads every format that soundfile supports (FLAC, WAV, Ogg Vorbis and Opus, MP3), averages the channels (where they
    cancel each other, takes the loudest one), resamples where the rate differs, and clips peaks up to `LOUDEST_PEAK`.
    `start_s` and `duration_s` select a part of the recording.
    Reads in blocks until the end, whatever the header says; so memory is that of the result.
    Raises `AudioError`, and nothing else, for a file that cannot be used (reasons: missing, unreadable, empty, too
    long, truncated, non-finite, out of range, sample rate, channels, silent), OSError where the disk fails.
    """

    def decode(channel: int | None = None) -> tuple[np.ndarray, _Levels]:
        levels = _Levels(path)
        with _open(path, path, whole=not start_s and duration_s is None) as file:
            start = min(round(start_s * file.samplerate), file.frames)
            _seek(file, start)
            frames = None if duration_s is None else round(duration_s * file.samplerate)
            blocks = _mono(file, levels, frames, max_duration_s, channel)
            samples = _resample(blocks, file.samplerate, sample_rate)
            if duration_s is None:
                _check_whole(file, levels, start)
        return samples, levels

    samples, levels = decode()
    if levels.cancelled:
        samples, _ = decode(levels.loudest)
    if samples.size == 0:
        raise AudioError(path, "empty", "holds no samples")
    if duration_s is None and np.abs(samples).max() < SILENCE_PEAK:
        raise AudioError(path, "silent", f"holds silence only at {sample_rate} Hz")
    return torch.from_numpy(samples).clamp_(-1, 1)


@contextlib.contextmanager
def open_parts(path: str | Path, sample_rate: int = 16_000) -> Iterator[Callable[[float, float], Tensor]]:
    """A function that reads parts of a recording, by `start_s` and `duration_s`, as `load_audio` does.

    Each begins where the one before it did, or later: so every sample is decoded once, where `load_audio` decodes all
    that is before a part of an MP3.
    """
    with contextlib.ExitStack() as opened:
        with _naming(path):
            file = opened.enter_context(_opened(path, path, whole=True))
        held, first = np.empty((0, file.channels), np.float32), 0  # samples from the beginning of the last part on

        def part(start_s: float, duration_s: float) -> Tensor:
            nonlocal held, first
            start, frames = round(start_s * file.samplerate), round(duration_s * file.samplerate)
            with _naming(path):
                missing = start + frames - first - len(held)
                held, first = np.concatenate([held, *_blocks(file, missing)])[start - first :], start
                block, levels = held[:frames], _Levels(path)
                if not len(block):
                    raise AudioError(path, "empty", "holds no samples")
                levels.add(block, mono := block.mean(1))
                if levels.cancelled:
                    mono = block[:, levels.loudest]
                return torch.from_numpy(_resample([mono], file.samplerate, sample_rate)).clamp_(-1, 1)

        yield part


def inspect_audio(
    source: str | Path | bytes, name: str | Path | None = None, max_duration_s: float | None = None
) -> AudioInfo:
    """Read a recording, or the content of its file, through with the checks of `load_audio`; errors say `name`."""
    name = name or str(source)
    levels = _Levels(name)
    with _open(source, name) as file:
        for _ in _mono(file, levels, max_duration_s=max_duration_s):
            pass
        _check_whole(file, levels)
        return AudioInfo(levels.frames / file.samplerate, file.format)


def audio_duration(path: str | Path, most_s: float = math.inf) -> float:
    """Seconds of a recording by its header, or counted where no header states them or they cannot be true.

    most_s: beyond which they are not counted on. Raises AudioError (missing, unreadable, truncated, sample rate).
    """
    with _open(path, path, whole=False) as file:
        status = os.stat(path)
        if file.stated and file.frames <= status.st_size * DENSEST:
            return file.frames / file.samplerate
    return _counted_s(path, status.st_size, status.st_mtime_ns, most_s)


@functools.lru_cache(COUNTED)
def _counted_s(path: str | Path, size: int, changed_ns: int, most_s: float) -> float:
    """Seconds of the samples that a recording of this size and time has; a training asks for them at every crop."""
    frames = 0
    with _open(path, path, whole=False) as file:
        for block in _blocks(file):
            frames += len(block)
            if frames > most_s * file.samplerate:
                break
        return frames / file.samplerate


def open_recording(path: str | Path) -> io.FileIO:
    """Open a plain file for its bytes. Raises AudioError (missing, unreadable) for any other; OSError of the disk."""
    try:
        stream = io.FileIO(path, opener=_open_at_once)
    except PermissionError as error:
        raise AudioError(path, "unreadable", f"cannot be read ({error.strerror})") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in NO_FILE:
            raise  # the recording may be there when the disk works again
        kind = ", it is a folder" if isinstance(error, IsADirectoryError) else ""
        raise AudioError(path, "missing", f"no such audio file{kind}") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise AudioError(path, "missing", "no such audio file, it is a pipe or device")
    return stream


def hash_recording(path: str | Path) -> str:
    """SHA-256 of a recording's file, hexadecimal. Raises what `open_recording` does."""
    with _naming(path), open_recording(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # without waiting for the writer of a pipe


def resample(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """Change the sample rate of a waveform on the CPU, float32 [N] -> float32 [ceil(N * new_rate / rate)].

    By the sinc interpolation of soxr (20 bits; pass band up to 0.91 of the lower Nyquist frequency), without delay, at
    a cost that does not depend on common factors of the rates.
    """
    if rate == new_rate:
        return waveform
    return torch.from_numpy(_resample([waveform.detach().cpu().numpy()], rate, new_rate))


class _Forward(soundfile.SoundFile):
    """Reads forward only: soundfile seeks after every read of a seekable file, which fails at the end of some FLACs."""

    stated: int  # samples per channel in the header; 0: it does not say

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def _open(source: str | Path | bytes, name: str | Path, whole: bool = True) -> Iterator[_Forward]:
    """As `_opened`; whatever goes wrong until it is closed becomes an AudioError."""
    with _naming(name), _opened(source, name, whole) as file:
        yield file


@contextlib.contextmanager
def _opened(source: str | Path | bytes, name: str | Path, whole: bool) -> Iterator[_Forward]:
    """The recording in a file or of its content.

    `whole`: it is read to its end, whatever number of samples a FLAC header states; an MP3 that states none always is.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open_recording(source) as stream:
        head, cut, mp3 = stream.read(1024), is_cut_ogg(stream), Mp3.of(stream)
        following = mp3.following(stream) if mp3 else 0.0
        stream.seek(0)
        flac = head.startswith(b"fLaC\0\0\0\x22") and len(head) > Uncounted.COUNT[-1]
        # without its name, because soundfile takes the ending .raw, not the content, for the format
        content: Any = (watched := Watched(stream))
        if flac and whole:
            content = Uncounted(watched, head)
        elif mp3 and not mp3.counted:
            content = Stretched(watched)
        with watched.raising(), _Forward(content) as file:
            count = int.from_bytes(head[21:26]) % 2**36 if flac else file.frames
            file.stated = count if count < UNKNOWN and not isinstance(content, Stretched) else 0
            if file.samplerate not in RATES:
                detail = f"states {file.samplerate} Hz, expected {RATES[0]} to {RATES[-1]} Hz: convert it again"
                raise AudioError(name, "sample rate", detail)
            if file.channels > CHANNELS:
                raise AudioError(name, "channels", f"has {file.channels} channels, at most {CHANNELS} can be read")
            if cut or missing_s(file, head) > HEADER_TOLERANCE_S:
                raise AudioError(name, "truncated", "ends before its last sample: fetch or convert it again")
            if following * file.frames / file.samplerate + unstated_s(file) > HEADER_TOLERANCE_S:
                raise AudioError(name, "truncated", "holds more than its header states: fetch or convert it again")
            yield file


@contextlib.contextmanager
def _naming(name: str | Path) -> Iterator[None]:
    """While active, whatever goes wrong with a recording becomes an AudioError; errors of the disk name it."""
    try:
        yield
    except AudioError:
        raise
    except MemoryError as error:
        raise AudioError(name, "too long", "needs more memory than there is: split it") from error
    except (soundfile.SoundFileError, PermissionError, TypeError, ValueError, RuntimeError) as error:
        reason = getattr(error, "error_string", error)  # libsndfile's own, without the number of the descriptor
        raise AudioError(name, "unreadable", f"not a readable audio file ({reason})") from error
    except OSError as error:
        error.filename = error.filename or str(name)
        raise


def _seek(file: soundfile.SoundFile, start: int) -> None:
    """Go to a frame of a recording of which nothing was read, so that what follows is as in the whole."""
    place = start
    if file.format == "MP3":
        place = start - round(LEAD_S * file.samplerate)
    elif file.subtype == "VORBIS":  # in whose last second libsndfile finds other places
        place = min(start, file.frames - round(END_S * file.samplerate))
    if place > 0:
        file.seek(place)
    for _ in _blocks(file, start - max(0, place)):
        pass


def _blocks(file: soundfile.SoundFile, frames: int | None = None) -> Iterator[np.ndarray]:
    """The next `frames` frames, all when None, float32 [n, C] at a time."""
    left = math.inf if frames is None else frames
    most = max(1, BLOCK // file.channels)
    while left > 0 and len(block := file.read(int(min(most, left)), "float32", always_2d=True)):
        left -= len(block)
        yield block


class _Levels:
    """What was read of a recording: frames, range of the mono samples, energies of the channels and their average."""

    def __init__(self, name: str | Path):
        self.name = name
        self.frames, self.lowest, self.highest, self.mono = 0, math.inf, -math.inf, 0.0
        self.channels: np.ndarray | float = 0.0

    def add(self, block: np.ndarray, mono: np.ndarray) -> None:
        """Samples float32 [n, C] and their average [n]. Raises AudioError for values that no recording has."""
        peak = max(block.max(), -block.min())
        if not np.isfinite(peak):
            raise AudioError(self.name, "non-finite", "holds NaN or infinite samples: record or convert it again")
        if peak > LOUDEST_PEAK:
            detail = (
                f"has a peak of {peak:.4g} where floating-point samples lie in [-1, 1]: divide them by their full "
                "scale, 32768 for 16-bit integers, and write it again"
            )
            raise AudioError(self.name, "out of range", detail)
        self.frames += len(block)
        self.lowest, self.highest = min(self.lowest, mono.min()), max(self.highest, mono.max())
        if block.shape[1] > 1:
            self.mono += np.square(mono, dtype=np.float64).sum()
            self.channels = self.channels + np.square(block, dtype=np.float64).sum(0)

    @property
    def cancelled(self) -> bool:
        """Whether the channels' average is next to nothing while they hold something, as in opposite phases."""
        return bool(self.mono < CANCELLED * np.mean(self.channels))

    @property
    def loudest(self) -> int:
        return int(np.argmax(self.channels))


def _mono(
    file: soundfile.SoundFile,
    levels: _Levels,
    frames: int | None = None,
    max_duration_s: float | None = None,
    channel: int | None = None,
) -> Iterator[np.ndarray]:
    """The recording's blocks as float32 [n], the average of the channels or one of them; notes their levels."""
    for block in _blocks(file, frames):
        mono = block.mean(1) if channel is None else block[:, channel]
        levels.add(block, mono)
        if frames is None and max_duration_s is not None and levels.frames > max_duration_s * file.samplerate:
            total_s = max(levels.frames, file.stated) / file.samplerate
            detail = f"{total_s:.1f} s long, at most {max_duration_s:g} s are allowed: split it or raise the limit"
            raise AudioError(levels.name, "too long", detail if file.stated else f"more than {detail}")
        yield mono


def _check_whole(file: soundfile.SoundFile, levels: _Levels, start: int = 0) -> None:
    """Raise AudioError if a recording, read to its end, is not what its header states, or is constant."""
    stated_s, found_s = file.stated / file.samplerate, (start + levels.frames) / file.samplerate
    more = file.stated and file.format == "FLAC" and found_s - stated_s > HEADER_TOLERANCE_S  # others may estimate
    if more or stated_s - found_s > HEADER_TOLERANCE_S:
        detail = f"ends after {found_s:.2f} s, not the {stated_s:.2f} s in its header: fetch or convert it again"
        raise AudioError(levels.name, "truncated", detail)
    if levels.frames == 0:
        raise AudioError(levels.name, "empty", "holds no samples")
    if levels.highest - levels.lowest < 2 * SILENCE_PEAK and not levels.cancelled:
        raise AudioError(levels.name, "silent", "holds one value only: nothing was recorded")


def _resample(blocks: Iterable[np.ndarray], rate: int, new_rate: int) -> np.ndarray:
    """Consecutive samples float32 [n] -> all of them at the new rate, float32 [ceil(N * new_rate / rate)]."""
    if rate == new_rate:
        return np.concatenate([np.empty(0, np.float32), *blocks])
    stream = soxr.ResampleStream(rate, new_rate, 1, "float32")
    samples, parts = 0, []
    for block in blocks:
        samples += len(block)
        parts.append(stream.resample_chunk(np.ascontiguousarray(block, np.float32)))
    parts.append(stream.resample_chunk(np.zeros(2 * rate // new_rate + 2, np.float32), last=True))  # the last sample
    return np.concatenate(parts)[: -(-samples * new_rate // rate)]


def save_audio(path: str | Path, waveform: Tensor, sample_rate: int = 16_000) -> None:
    """Write a waveform float [N] as 16-bit audio, atomically; the file extension selects the format."""
    with atomic_file(path) as part:  # as bytes: libsndfile does not say that a disk is full
        part.write_bytes(audio_content(waveform, sample_rate, audio_format(path)))


def audio_content(waveform: Tensor, sample_rate: int, kind: str = "WAV") -> bytes:
    """The content of a 16-bit audio file that holds a waveform float [N]; kind: its format."""
    samples, content = waveform.detach().clamp(-1, 1).cpu().numpy(), io.BytesIO()
    with soundfile.SoundFile(content, "w", sample_rate, 1, format=kind) as file:
        for start in range(0, len(samples), BLOCK):  # Vorbis's encoder crashes on minutes at once
            file.write(samples[start : start + BLOCK])
    return content.getvalue()


def audio_format(path: str | Path) -> str:
    """The audio format of a file name, such as WAV. Raises InputError for one that cannot be written."""
    kind, known = Path(path).suffix[1:].upper(), soundfile.available_formats()
    if kind not in known:
        raise InputError(f"{path}: expected the name of an audio file, ending in .wav, .flac or .ogg")
    return kind


def fit_length(waveform: Tensor, length: int) -> Tensor:
    """A waveform float [N], cut or zero-padded at its end to `length` samples."""
    return torch.nn.functional.pad(waveform[:length], (0, max(0, length - len(waveform))))


def pad_waveforms(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack waveforms float [N_i] into float [B, N], zero-padded at the end, with lengths long [B] in samples."""
    lengths = torch.tensor([waveform.shape[0] for waveform in waveforms])
    return torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True), lengths
