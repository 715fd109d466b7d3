"""Long recordings in pieces: nothing is lost, cuts lie where it is quiet."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from speechllm import AudioError, load_audio, save_audio
from speechllm.pauses import quietest
from speechllm.pieces import pieces

RATE = 8_000


def words(*pauses: tuple[float, float], seconds: float) -> Tensor:
    """Noise with silence between the given times, float [N]."""
    waveform = torch.rand(round(seconds * RATE), generator=torch.Generator().manual_seed(0)) - 0.5
    for start_s, end_s in pauses:
        waveform[round(start_s * RATE) : round(end_s * RATE)] = 0
    return waveform


def test_pieces_are_cut_in_pauses_and_together_are_the_recording(tmp_path: Path) -> None:
    save_audio(tmp_path / "a.flac", words((1, 1.5), (3, 3.5), (5.2, 5.6), seconds=9), RATE)
    found = list(pieces(tmp_path / "a.flac", RATE, longest_s=4))
    assert torch.equal(torch.cat([piece.waveform for piece in found]), load_audio(tmp_path / "a.flac", RATE))
    assert [piece.start_s for piece in found[1:]] == [piece.end_s for piece in found[:-1]]
    assert 3 < found[1].start_s < 3.5 and 5.2 < found[2].start_s < 5.6
    assert all(piece.duration_s <= 4 for piece in found)


def test_a_recording_that_is_not_longer_is_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("speechllm.pieces.inspect_audio")  # which would decode it once more
    save_audio(tmp_path / "a.wav", words(seconds=4), RATE)
    (piece,) = pieces(tmp_path / "a.wav", 16_000, longest_s=4)
    assert (piece.start_s, piece.duration_s) == (0, 4)
    assert torch.equal(piece.waveform, load_audio(tmp_path / "a.wav", 16_000))


def test_a_cut_is_never_in_the_first_half_and_pieces_end_where_the_recording_does(tmp_path: Path) -> None:
    assert quietest(words((0, 2), (2.6, 3.0), seconds=4), RATE) == pytest.approx(2.8 * RATE, abs=0.06 * RATE)
    save_audio(tmp_path / "a.wav", words(seconds=11.3), RATE)
    found = list(pieces(tmp_path / "a.wav", 16_000, longest_s=3))
    assert found[-1].end_s == pytest.approx(11.3, abs=1e-3)
    assert all(1.5 <= piece.duration_s <= 3 for piece in found[:-1])


def test_what_is_wrong_with_a_recording_is_said_before_its_first_piece(tmp_path: Path) -> None:
    save_audio(tmp_path / "long.wav", words(seconds=9), RATE)
    with pytest.raises(AudioError, match="9.0 s long, at most 8 s are allowed"):
        next(pieces(tmp_path / "long.wav", RATE, longest_s=3, max_duration_s=8))
    content = (tmp_path / "long.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[: len(content) // 2])
    for name, words_of_it in (("cut.wav", "ends before its last sample"), ("none.wav", "no such audio file")):
        with pytest.raises(AudioError, match=words_of_it):
            next(pieces(tmp_path / name, RATE, longest_s=3))
