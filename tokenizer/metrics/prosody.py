"""Prosodic similarity of two recordings of the same words: mel-cepstral distortion and pitch correlation."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.metrics.quality import QualityError, resample_to_16_khz
from tokenizer.rates import SAMPLE_RATE

FRAME_S = 0.005
ORDER = 24  # mel-cepstral coefficients, without c0, the level
ALPHA = 0.42  # of the all-pass filter, which approximates the mel scale at 16 kHz
SPEECH_DB = 40.0  # frames further below the loudest one are silence and ignored
FLOOR_DB = 80.0  # below the loudest bin; otherwise an empty frequency band would dominate the distance
LEAST_VOICED = 20  # frames, 0.1 s: fewer give no meaningful correlation
DISTORTION_DB = 10 * np.sqrt(2) / np.log(10)  # per neper of distance between mel-cepstra (Kubichek 1993)


@dataclass(frozen=True)
class VoiceFrames:
    """Frames of the speech in a recording, one every 5 ms, without silence.

    cepstra: float [T, 24], mel-cepstral coefficients c1 to c24.
    f0: float [T], fundamental frequency in Hz; 0 where unvoiced.
    """

    cepstra: np.ndarray
    f0: np.ndarray


AlignedVoices = tuple[VoiceFrames, VoiceFrames]  # of equal length, aligned frame by frame by `align_voices`


def voice_frames(waveform: Tensor | np.ndarray, sample_rate: int) -> VoiceFrames:
    """Analyse a waveform float [N] with WORLD (Morise et al. 2016): F0 by DIO and StoneMask, envelope by CheapTrick.

    At 16 kHz, with an FFT of 1024, frames of 5 ms and F0 from 71 to 800 Hz. Frames more than 40 dB below the loudest
    are ignored; the envelope has a floor 80 dB below its peak. Mel-cepstra as in SPTK (order 24, alpha 0.42).
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
    """Power spectra float [T, F] from 0 Hz to half the sample rate -> float [T, 24], c1 to c24 in nepers.

    These are the coefficients of log|H| = c0 + sum of c_m cos(m w) over the warped frequency
    w = v + 2 atan(alpha sin v / (1 - alpha cos v)) (Tokuda et al. 1994).
    """
    bins = power.shape[1]
    warped = np.linspace(0, np.pi, bins)
    plain = warped - 2 * np.arctan(ALPHA * np.sin(warped) / (1 + ALPHA * np.cos(warped)))
    position = plain / np.pi * (bins - 1)
    below = np.minimum(position.astype(int), bins - 2)
    log = np.log(power)
    between = log[:, below] + (position - below) * (log[:, below + 1] - log[:, below])
    return np.fft.irfft(between)[:, 1 : ORDER + 1]


def dtw(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest path through a cost matrix [n, m] from corner to corner: its rows and columns, int [L] each.

    Dynamic time warping (Sakoe & Chiba 1978) with steps of one frame in one or both directions, all of weight 1.
    """
    total = np.empty(cost.shape)
    total[0] = np.cumsum(cost[0])
    for row in range(1, len(cost)):
        above = total[row - 1]
        entry = np.minimum(above, np.append(np.inf, above[:-1]))  # cheapest path that enters this row at each column
        run = np.cumsum(cost[row])  # then along the row: the costs from that column on
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
    """Align T and T' frames by `dtw` over mel-cepstral distances -> both with the L frames of the path."""
    a_cepstra, b_cepstra = torch.from_numpy(a.cepstra), torch.from_numpy(b.cepstra)
    # exact: 0 for equal frames
    cost = torch.cdist(a_cepstra, b_cepstra, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    rows, columns = dtw(cost)
    return VoiceFrames(a.cepstra[rows], a.f0[rows]), VoiceFrames(b.cepstra[columns], b.f0[columns])


def mel_cepstral_distortion(voices: AlignedVoices) -> float:
    """Distortion in dB, 0 for equal recordings: the mean over the frames of 10 / ln 10 sqrt(2 sum (c_m - c'_m)^2).

    m runs from 1 to 24.
    """
    converted, reference = voices
    return float(DISTORTION_DB * np.linalg.norm(converted.cepstra - reference.cepstra, axis=1).mean())


def pitch_correlation(voices: AlignedVoices) -> float:
    """Pearson's correlation of log F0 over the frames that are voiced in both.

    Raises QualityError (reasons: unvoiced, constant pitch) if it is not defined.
    """
    f0 = np.stack([voice.f0 for voice in voices])
    log = np.log(f0[:, (f0 > 0).all(0)])
    if log.shape[1] < LEAST_VOICED:
        detail = f"{log.shape[1]} frames are voiced in both recordings, {LEAST_VOICED} are needed to correlate them"
        raise QualityError("unvoiced", detail)
    if log.std(1).min() < 1e-6:
        raise QualityError("constant pitch", "the pitch of a recording is constant: nothing to correlate")
    return float(np.corrcoef(log)[0, 1])


def _world() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pyworld looks up its own version in a deprecated way
            import pyworld
    except ImportError as error:
        raise ImportError(f'{error.name} is needed to measure prosody: pip install "speechllm[eval]"') from error
    return pyworld
