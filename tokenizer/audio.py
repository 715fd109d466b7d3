"""Reading and writing audio files as float waveforms, with one clear error for every file that cannot be used."""

from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from torchaudio.functional import resample

from tokenizer.errors import InputError
from tokenizer.files import atomic_file

SILENCE_PEAK = 1e-6  # below this peak a recording holds digital silence: nothing was recorded


class AudioError(InputError):
    """A recording that cannot be used; `reason` is one or two words, for counting skipped recordings."""

    def __init__(self, path: str | Path, reason: str, detail: str):
        super().__init__(f"{path}: {detail}")
        self.reason = reason


def load_audio(
    path: str | Path,
    sample_rate: int = 16_000,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
    max_duration_s: float | None = None,
) -> Tensor:
    """Read a recording as a mono waveform, float32 [N] in [-1, 1], at `sample_rate` Hz.

    Reads every format that soundfile supports (FLAC, WAV, Ogg Vorbis and Opus, MP3), averages the channels and
    resamples where the rate differs. `start_s` and `duration_s` select a part of the recording.
    Raises `AudioError` (reasons: missing, unreadable, empty, too long, non-finite, silent).
    """
    if not Path(path).is_file():
        raise AudioError(path, "missing", "no such audio file")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            total_s = file.frames / rate
            if max_duration_s is not None and duration_s is None and total_s > max_duration_s:
                detail = f"{total_s:.1f} s long, at most {max_duration_s:g} s are allowed: split it or raise the limit"
                raise AudioError(path, "too long", detail)
            start = round(start_s * rate)
            if start:
                file.seek(min(start, file.frames))
            samples = file.read(-1 if duration_s is None else round(duration_s * rate), "float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(path, "unreadable", f"not a readable audio file ({error})") from error
    waveform = torch.from_numpy(samples.mean(axis=1))
    if waveform.numel() == 0:
        raise AudioError(path, "empty", "holds no samples")
    if not torch.isfinite(waveform).all():
        raise AudioError(path, "non-finite", "holds NaN or infinite samples: record or convert it again")
    if duration_s is None and waveform.abs().max() < SILENCE_PEAK:
        raise AudioError(path, "silent", "holds digital silence only")
    return resample(waveform, rate, sample_rate) if rate != sample_rate else waveform


def save_audio(path: str | Path, waveform: Tensor, sample_rate: int = 16_000) -> None:
    """Write a waveform float [N] as 16-bit audio, atomically; the file extension selects the format."""
    samples, kind = waveform.detach().clamp(-1, 1).cpu().numpy(), audio_format(path)
    with atomic_file(path) as part:
        soundfile.write(part, samples, sample_rate, format=kind)


def audio_format(path: str | Path) -> str:
    """The audio format of a file name, such as WAV. Raises InputError for one that cannot be written."""
    kind, known = Path(path).suffix[1:].upper(), soundfile.available_formats()
    if kind not in known:
        raise InputError(f"{path}: expected the name of an audio file, ending in .wav, .flac or .ogg")
    return kind


def pad_waveforms(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack waveforms float [N_i] into float [B, N], zero-padded at the end, with lengths long [B] in samples."""
    lengths = torch.tensor([waveform.shape[0] for waveform in waveforms])
    return torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True), lengths
