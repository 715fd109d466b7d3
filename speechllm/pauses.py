"""Where to cut a long recording: where it is quiet, or in a pause of speech that Silero VAD hears."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.audio import resample
from tokenizer.errors import InputError

Cut = Callable[[Tensor, int], int]  # a waveform float [N] at a rate in Hz -> the sample to cut at, in its second half
PAUSE_S = 0.3  # a cut lies in the middle of a span of this length
SILERO = "silero"  # the model in the package of this name
RATE = 16_000  # Hz; of what Silero VAD hears
NO_SPEECH = 0.5  # mean probability of speech below which a span is a pause
FRAME, BEFORE = 512, 64  # samples: of a frame, and of those before it that are heard again


def quietest(waveform: Tensor, sample_rate: int) -> int:
    """Where to cut a waveform float [N]: the sample in its second half around which `PAUSE_S` have the least energy."""
    half = len(waveform) // 2
    span = min(round(PAUSE_S * sample_rate), half)
    return half + span // 2 + int(_means(waveform[half:].square(), span).argmin())


def _means(values: Tensor, span: int) -> Tensor:
    """Of each `span` of values float [N], float64 [N - span + 1]."""
    sums = F.pad(values.double().cumsum(0), (1, 0))
    return (sums[span:] - sums[:-span]) / span


def load_cut(vad: str | None) -> Cut:
    """`quietest` for None; for "silero" or an ONNX file of Silero VAD where it hears no speech.

    Raises InputError for a file that is none, ImportError where a package is missing.
    """
    if vad is None:
        return quietest
    try:
        import onnxruntime

        file = _packaged() if vad == SILERO else Path(vad)
    except ImportError as error:
        raise ImportError(f'{error.name} is needed for --vad: pip install "speechllm[vad]"') from error
    if not file.is_file():
        raise InputError(f"--vad {vad}: no such file; `--vad {SILERO}` takes the one in the package silero-vad")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # a frame is too short to share
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        silero = SileroCut(session.run)
        silero(torch.zeros(4 * FRAME), RATE)
    except Exception as error:  # those of onnxruntime have no base of their own
        why = " ".join(str(error).split())[:200]
        raise InputError(f"--vad {vad} is no Silero VAD of version 5 or later as ONNX: {why}") from error
    return silero


def _packaged() -> Path:
    """The file in silero-vad, whose import would change torch's number of threads."""
    if (found := importlib.util.find_spec("silero_vad")) is None or found.origin is None:
        raise ImportError("no silero-vad", name="silero-vad")
    return Path(found.origin).with_name("data") / "silero_vad.onnx"


class SileroCut:
    """Cuts at the quietest of the pauses in which Silero VAD hears no speech; without any, where it hears the least."""

    def __init__(self, run: Callable[[None, dict[str, Any]], list[np.ndarray]]):
        """run: of the model's session: a frame, a state and a rate -> the probability of speech, and the next state."""
        self._run = run

    def __call__(self, waveform: Tensor, sample_rate: int) -> int:
        half = len(waveform) // 2
        heard = resample(waveform[half:], sample_rate, RATE)
        speech = self.probabilities(heard)
        energy = F.pad(heard, (0, -len(heard) % FRAME)).view(-1, FRAME).square().mean(1)
        span = min(round(PAUSE_S * RATE / FRAME), len(speech))
        spoken = _means(speech, span)
        pauses = torch.where(spoken < NO_SPEECH, _means(energy, span), torch.inf)
        best = int((pauses if pauses.isfinite().any() else spoken).argmin())
        return min(half + round((best + span / 2) * FRAME / RATE * sample_rate), len(waveform))

    def probabilities(self, waveform: Tensor) -> Tensor:
        """Of speech in each frame of a waveform float [N] at 16 kHz, float [ceil(N / 512)]."""
        samples = F.pad(waveform, (BEFORE, -len(waveform) % FRAME)).numpy()
        state, found = np.zeros((2, 1, 128), np.float32), []
        for start in range(0, len(samples) - BEFORE, FRAME):
            heard = samples[None, start : start + BEFORE + FRAME]
            (probability, *_), state = self._run(None, {"input": heard, "state": state, "sr": np.array(RATE)})
            found.append(float(probability.item()))
        return torch.tensor(found)
