"""How close one voice comes to another saying the same words: mel-cepstral distortion and correlation of the pitch."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.metrics.quality import QualityError, resample_to_16_khz
from tokenizer.rates import SAMPLE_RATE

FRAME_S = 0.005
ORDER = 24  # mel-cepstral coefficients; c0, the level, is skipped
ALPHA = 0.42  # of the all-pass that warps frequencies about as the mel scale does, at 16 kHz
SPEECH_DB = 40.0  # frames further below the loudest one are silence and skipped
FLOOR_DB = 80.0  # below the loudest bin: a band in which nothing was recorded would outweigh the voice in the others
LEAST_VOICED = 20  # frames, 0.1 s: a correlation over fewer says nothing
DISTORTION_DB = 10 * np.sqrt(2) / np.log(10)  # of one neper of distance between mel-cepstra (Kubichek 1993)


@dataclass(frozen=True)
class VoiceFrames:
    """The speech of a recording, one frame every 5 ms, its silence skipped.

    cepstra: float [T, 24], mel-cepstral coefficients c1 to c24.
    f0: float [T], fundamental frequency in Hz; 0 where unvoiced.
    """

    cepstra: np.ndarray
    f0: np.ndarray


AlignedVoices = tuple[VoiceFrames, VoiceFrames]  # of one length, frame by frame the same sound; from `align_voices`


def voice_frames(waveform: Tensor | np.ndarray, sample_rate: int) -> VoiceFrames:
    """Analyse a waveform float [N] by WORLD (Morise et al. 2016): F0 by DIO and StoneMask, envelope by CheapTrick.

    It is resampled to 16 kHz; an FFT of 1024, frames of 5 ms, F0 from 71 to 800 Hz; frames more than 40 dB below the
    loudest are skipped, and the envelope has a floor 80 dB below its peak. Mel-cepstra as in SPTK (order 24, alpha
    0.42).
    Raises QualityError (reasons: non-finite, too short, too long, silent), and ImportError without pyworld.
    """
    world = _world()
    speech = resample_to_16_khz(waveform, sample_rate).double().numpy()
    rough, times = world.dio(speech, SAMPLE_RATE, frame_period=1000 * FRAME_S)
    f0 = world.stonemask(speech, rough, times, SAMPLE_RATE)
    power = world.cheaptrick(speech, f0, times, SAMPLE_RATE)
    level = power.mean(1)
    loud = level > level.max() * 10 ** (-SPEECH_DB / 10)
    return VoiceFrames(mel_cepstra(power[loud].clip(power.max() * 10 ** (-FLOOR_DB / 10))), f0[loud])


def mel_cepstra(power: np.ndarray) -> np.ndarray:
    """Power spectra float [T, F] from 0 to half the rate -> float [T, 24], c1 to c24 in nepers.

    They are the coefficients of log|H| = c0 + sum of c_m cos(m w) over the warped frequency
    w = v + 2 atan(alpha sin v / (1 - alpha cos v)) (Tokuda et al. 1994).
    """
    bins = power.shape[1]
    warped = np.linspace(0, np.pi, bins)
    plain = warped - 2 * np.arctan(ALPHA * np.sin(warped) / (1 + ALPHA * np.cos(warped)))
    place = plain / np.pi * (bins - 1)
    below = np.minimum(place.astype(int), bins - 2)
    log = np.log(power)
    between = log[:, below] + (place - below) * (log[:, below + 1] - log[:, below])
    return np.fft.irfft(between)[:, 1 : ORDER + 1]


def dtw(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest way through a cost matrix [n, m], from corner to corner: rows and columns int [L] it visits.

    Dynamic time warping (Sakoe & Chiba 1978) with steps of one frame in either or both, all of weight 1.
    """
    total = np.empty(cost.shape)
    total[0] = np.cumsum(cost[0])
    for row in range(1, len(cost)):
        above = total[row - 1]
        entry = np.minimum(above, np.append(np.inf, above[:-1]))  # cheapest way to enter this row at each column
        run = np.cumsum(cost[row])  # then along the row: its costs from the entry on
        total[row] = run + np.minimum.accumulate(entry - run + cost[row])
    row, column = len(cost) - 1, cost.shape[1] - 1
    path = [(row, column)]
    while row or column:
        steps = [(row - 1, column - 1), (row - 1, column), (row, column - 1)]
        row, column = min((step for step in steps if min(step) >= 0), key=lambda step: total[step])
        path.append((row, column))
    rows, columns = np.array(path[::-1]).T
    return rows, columns


def align_voices(a: VoiceFrames, b: VoiceFrames) -> AlignedVoices:
    """Voices of T and T' frames -> both with the L frames of the path of `dtw`, over the distances of mel-cepstra."""
    pair = torch.from_numpy(a.cepstra), torch.from_numpy(b.cepstra)
    cost = torch.cdist(*pair, compute_mode="donot_use_mm_for_euclid_dist").numpy()  # exact: 0 for equal frames
    rows, columns = dtw(cost)
    return VoiceFrames(a.cepstra[rows], a.f0[rows]), VoiceFrames(b.cepstra[columns], b.f0[columns])


def mel_cepstral_distortion(voices: AlignedVoices) -> float:
    """Distortion in dB, 0 for equal voices: the mean over the frames of 10 / ln 10 sqrt(2 sum (c_m - c'_m)^2).

    m runs from 1 to 24.
    """
    converted, reference = voices
    return float(DISTORTION_DB * np.linalg.norm(converted.cepstra - reference.cepstra, axis=1).mean())


def pitch_correlation(voices: AlignedVoices) -> float:
    """Pearson's correlation of log F0 over the frames voiced in both.

    Raises QualityError (reasons: unvoiced, constant pitch) where it is not defined.
    """
    f0 = np.stack([voice.f0 for voice in voices])
    log = np.log(f0[:, (f0 > 0).all(0)])
    if log.shape[1] < LEAST_VOICED:
        detail = f"{log.shape[1]} frames are voiced in both recordings, {LEAST_VOICED} are needed to correlate them"
        raise QualityError("unvoiced", detail)
    if log.std(1).min() < 1e-6:
        raise QualityError("constant pitch", "the pitch of a recording does not move: nothing to correlate")
    return float(np.corrcoef(log)[0, 1])


def _world() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pyworld asks for its own version in a deprecated way
            import pyworld
    except ImportError as error:
        raise ImportError(f'{error.name} is needed to measure prosody: pip install "speechllm[eval]"') from error
    return pyworld
