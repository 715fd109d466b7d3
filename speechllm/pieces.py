"""Long recordings in pieces that a language model was trained for, cut in pauses."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from speechllm.pauses import Cut, quietest
from tokenizer.audio import audio_duration, inspect_audio, load_audio, open_parts

LONGEST_S = 30.0
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
    path: str | Path,
    sample_rate: int,
    longest_s: float = LONGEST_S,
    max_duration_s: float | None = None,
    cut: Cut = quietest,
) -> Iterator[Piece]:
    """A recording in consecutive pieces of at most `longest_s`, of which one is in memory at a time.

    One that is no longer is one piece, equal to `load_audio`; others are cut in the second half of each piece.
    cut: says where.
    Raises AudioError, before the first piece, for a recording that cannot be used or exceeds `max_duration_s`.
    """
    if audio_duration(path, longest_s) <= longest_s:
        yield Piece(0.0, load_audio(path, sample_rate, max_duration_s=max_duration_s), sample_rate)
        return
    total_s, start_s = inspect_audio(path, max_duration_s=max_duration_s).duration_s, 0.0
    with open_parts(path, sample_rate) as part:
        while total_s - start_s > END_S:
            waveform = part(start_s, longest_s)
            if start_s + longest_s < total_s:
                waveform = waveform[: cut(waveform, sample_rate)].clone()
            piece = Piece(start_s, waveform, sample_rate)
            yield piece
            start_s = piece.end_s
