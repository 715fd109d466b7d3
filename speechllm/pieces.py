"""Long recordings in pieces that a language model was trained for, cut where it is quiet."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from tokenizer.audio import inspect_audio, load_audio

LONGEST_S = 30.0
PAUSE_S = 0.3  # a cut lies in the middle of the quietest span of this length
END_S = 0.05  # what is left of a recording and shorter than this is no piece


@dataclass(frozen=True)
class Piece:
    """A part of a recording: float [N] at `sample_rate` Hz, from `start_s` on."""

    start_s: float
    waveform: Tensor
    sample_rate: int

    @property
    def duration_s(self) -> float:
        return len(self.waveform) / self.sample_rate

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


def pieces(
    path: str | Path, sample_rate: int, longest_s: float = LONGEST_S, max_duration_s: float | None = None
) -> Iterator[Piece]:
    """A recording in consecutive pieces of at most `longest_s`, of which one is in memory at a time.

    One that is no longer is one piece, equal to `load_audio`; others are cut in the second half of each piece.
    Raises AudioError, before the first piece, for a recording that cannot be used or exceeds `max_duration_s`.
    """
    total_s = inspect_audio(path, max_duration_s=max_duration_s).duration_s
    if total_s <= longest_s:
        yield Piece(0.0, load_audio(path, sample_rate), sample_rate)
        return
    start_s = 0.0
    while total_s - start_s > END_S:
        waveform = load_audio(path, sample_rate, start_s=start_s, duration_s=longest_s)
        if start_s + longest_s < total_s:
            waveform = waveform[: quietest(waveform, sample_rate)].clone()
        piece = Piece(start_s, waveform, sample_rate)
        yield piece
        start_s = piece.end_s


def quietest(waveform: Tensor, sample_rate: int) -> int:
    """Where to cut a waveform float [N]: the sample in its second half around which `PAUSE_S` have the least energy."""
    half = len(waveform) // 2
    span = min(round(PAUSE_S * sample_rate), half)
    sums = F.pad(waveform[half:].double().square().cumsum(0), (1, 0))
    return half + span // 2 + int((sums[span:] - sums[:-span]).argmin())
