"""Quality of reconstructed speech compared to the original: PESQ, STOI, SI-SDR and a mel distance."""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchaudio.transforms import MelSpectrogram

from tokenizer.audio import SILENCE_PEAK, resample
from tokenizer.errors import InputError
from tokenizer.interface import Codec
from tokenizer.rates import SAMPLE_RATE  # of all metrics, because wide-band PESQ is defined for no other

SHORTEST_S = 0.25  # PESQ's own limit
MAX_SCORED_S = 40.0  # PESQ's buffers hold 50 speech segments; more corrupt memory: wrong scores, then a crash
LENGTH_TOLERANCE_S = 0.1  # a codec may add or drop a frame, not more


@dataclass(frozen=True)
class Quality:
    """Scores of one reconstruction against its original, both at 16 kHz.

    pesq_wb: wide-band PESQ, 1.0 to 4.64, MOS-LQO of ITU-T P.862.2; the one most codec papers report.
    pesq_nb: narrow-band PESQ, 1.0 to 4.55, ITU-T P.862 with the mapping of P.862.1; not comparable with pesq_wb.
    stoi: short-time objective intelligibility, up to 1 (Taal et al. 2011; computed at 10 kHz, not the extended one).
    si_sdr: scale-invariant signal-to-distortion ratio in dB, means removed (Le Roux et al. 2019), within +-156 dB.
    mel_distance: mean absolute difference of log10 mel magnitudes (80 HTK bands up to 8 kHz, Hann window and FFT of
        1024, hop 256, floor 1e-5); 0 for equal signals. The only metric for which lower is better.
    """

    pesq_wb: float
    pesq_nb: float
    stoi: float
    si_sdr: float
    mel_distance: float


class QualityError(InputError):
    """A pair that cannot be scored; `reason` is one or two words, for counting such pairs."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both, so that the error can be pickled
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


def speech_quality(original: Tensor | np.ndarray, reconstruction: Tensor | np.ndarray, sample_rate: int) -> Quality:
    """Score a reconstruction float [N] against its original float [N] at `sample_rate` Hz.

    Both are resampled to 16 kHz if necessary and cut to the shorter one, but neither aligned nor changed in level.
    Raises QualityError (reasons: non-finite, lengths differ, too short, too long, silent, pesq failed) for a pair that
    cannot be scored, and ImportError if pesq or pystoi is not installed.
    """
    a, b = _pair_resampled(original, reconstruction, sample_rate)
    clean, degraded = a.numpy(), b.numpy()
    return Quality(
        pesq_wb=_pesq(clean, degraded, "wb"),
        pesq_nb=_pesq(clean, degraded, "nb"),
        stoi=_stoi(clean, degraded),
        si_sdr=_si_sdr(clean, degraded),
        mel_distance=_mel_distance(a, b),
    )


def pesq_and_stoi(
    original: Tensor | np.ndarray, reconstruction: Tensor | np.ndarray, sample_rate: int
) -> dict[str, float]:
    """pesq_wb and stoi of `speech_quality`, by name, without the time that the others take; raises what it raises."""
    a, b = _pair_resampled(original, reconstruction, sample_rate)
    clean, degraded = a.numpy(), b.numpy()
    return {"pesq_wb": _pesq(clean, degraded, "wb"), "stoi": _stoi(clean, degraded)}


def layer_counts(codec: Codec, wanted: Sequence[int] | None = None) -> list[int]:
    """Numbers of codebooks to decode from, ascending: the wanted ones, or 1, 2, 4, ... and all when None.

    Raises InputError for more codebooks than the codec has.
    """
    most = codec.num_codebooks
    if wanted is None:
        return sorted({2**power for power in range(most.bit_length())} | {most})
    if not wanted or not all(1 <= count <= most for count in wanted):
        raise InputError(f"layers must be numbers from 1 to {most}, the codebooks of this codec; got {list(wanted)}")
    return sorted(set(wanted))


def reconstruct(codec: Codec, waveform: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
    """Encode a waveform float [N] once and decode it from each number of codebooks: float [N] on the CPU by number."""
    codes = codec.encode(waveform[None].to(codec.device), layers=max(counts))
    return {count: codec.decode(codes.first(count))[0].cpu() for count in counts}


def scorers() -> tuple[Any, Any]:
    """The packages pesq and pystoi; raises ImportError, which says what to install, if one is missing."""
    try:
        import pesq
        import pystoi
    except ImportError as error:
        raise ImportError(f'{error.name} is needed to measure speech: pip install "speechllm[eval]"') from error
    return pesq, pystoi


def resample_to_16_khz(waveform: Tensor | np.ndarray, sample_rate: int, name: str = "recording") -> Tensor:
    """Check a waveform float [N] and return it as float32 at 16 kHz on the CPU.

    Raises QualityError (reasons: non-finite, too short, too long, silent), whose message uses `name`.
    """
    speech = _finite(waveform, name)
    duration_s = len(speech) / sample_rate
    if duration_s < SHORTEST_S:
        raise QualityError("too short", f"the {name} is {duration_s:.2f} s long, at least {SHORTEST_S} s are needed")
    if duration_s > MAX_SCORED_S:
        detail = f"the {name} is {duration_s:.0f} s long, at most {MAX_SCORED_S:.0f} s can be scored: cut it"
        raise QualityError("too long", detail)
    if speech.abs().max() < SILENCE_PEAK:
        raise QualityError("silent", f"the {name} holds digital silence only")
    return resample(speech, sample_rate, SAMPLE_RATE)


def _finite(waveform: Tensor | np.ndarray, name: str) -> Tensor:
    speech = torch.as_tensor(waveform).detach().cpu().float()
    if speech.ndim != 1:
        raise ValueError(f"expected waveforms float [N], got the {name} of shape {tuple(speech.shape)}")
    if not torch.isfinite(speech).all():
        raise QualityError("non-finite", f"the {name} holds NaN or infinite samples")
    return speech


def _pair_resampled(
    original: Tensor | np.ndarray, reconstruction: Tensor | np.ndarray, sample_rate: int
) -> tuple[Tensor, Tensor]:
    """Both as float32 [N] of equal length at 16 kHz; raises QualityError."""
    pair = {
        name: _finite(waveform, name) for name, waveform in (("original", original), ("reconstruction", reconstruction))
    }
    shorter, longer = sorted(len(waveform) for waveform in pair.values())
    if longer - shorter > LENGTH_TOLERANCE_S * sample_rate:
        lengths = " and ".join(f"{len(waveform) / sample_rate:.2f} s" for waveform in pair.values())
        raise QualityError("lengths differ", f"original and reconstruction last {lengths}: not the same recording")
    a, b = (resample_to_16_khz(waveform[:shorter], sample_rate, name) for name, waveform in pair.items())
    return a, b


def _text(error: Exception) -> str:
    """The message of an error of pesq, which may be bytes."""
    message = error.args[0] if error.args else type(error).__name__
    return message.decode() if isinstance(message, bytes) else str(message)


def _pesq(original: np.ndarray, reconstruction: np.ndarray, mode: str) -> float:
    pesq, _ = scorers()
    try:  # let pesq raise, because otherwise it returns negative numbers, which would distort averages
        return float(pesq.pesq(SAMPLE_RATE, original, reconstruction, mode))
    except pesq.PesqError as error:
        raise QualityError("pesq failed", f"PESQ gives no score: {_text(error)}") from error


def _stoi(original: np.ndarray, reconstruction: np.ndarray) -> float:
    _, pystoi = scorers()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # for too little speech it only warns and returns 1e-5
        try:
            return float(pystoi.stoi(original, reconstruction, SAMPLE_RATE))
        except RuntimeWarning as error:
            detail = "STOI needs about 0.4 s of speech (frames within 40 dB of the loudest), this recording has less"
            raise QualityError("too short", detail) from error


def _si_sdr(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """SI-SDR in dB from the cosine c of the two: the part along the original has energy c^2, the rest 1 - c^2."""
    a, b = (x - x.mean() for x in (original.astype(np.float64), reconstruction.astype(np.float64)))
    limits = np.finfo(np.float64)
    share = np.clip((a @ b) ** 2 / max((a @ a) * (b @ b), limits.tiny), limits.eps, 1 - limits.eps)
    return float(10 * np.log10(share / (1 - share)))


@functools.cache
def _mel() -> MelSpectrogram:
    return MelSpectrogram(SAMPLE_RATE, n_fft=1024, hop_length=256, n_mels=80, power=1)


def _mel_distance(original: Tensor, reconstruction: Tensor) -> float:
    a, b = (torch.log10(_mel()(x).clamp(min=1e-5)) for x in (original, reconstruction))
    return float((a - b).abs().mean())
