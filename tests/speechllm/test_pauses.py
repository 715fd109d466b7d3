"""Pauses by a model of speech: cuts lie where it hears none, and what is no such model is refused in one line."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from speechllm.pauses import BEFORE, FRAME, RATE, SileroCut, load_cut, quietest
from tokenizer.errors import InputError


def hears_tones(_: None, heard: dict[str, np.ndarray]) -> list[np.ndarray]:
    """A stand-in: a positive frame is speech; its state counts frames and holds the end of the last one."""
    frame, state = heard["input"], heard["state"]
    assert frame.shape == (1, BEFORE + FRAME) and frame.dtype == np.float32 and heard["sr"] == RATE
    assert state[0, 0, 0] == 0 or np.array_equal(frame[0, :BEFORE], state[1, 0, :BEFORE])
    state = state.copy()
    state[0], state[1, 0, :BEFORE] = state[0] + 1, frame[0, -BEFORE:]
    return [np.array([[float(frame.mean() > 0.1)]], np.float32), state]


@pytest.mark.parametrize("rate", [RATE, 8_000])
def test_cuts_lie_where_no_speech_is_heard_however_loud(rate: int) -> None:
    """In the second half: speech, 0.5 s of something loud, speech, and a moment of quiet too short for a pause."""
    waveform = torch.full((4 * rate,), 0.5)
    waveform[round(2.6 * rate) : round(3.1 * rate)] = -0.9
    waveform[round(3.5 * rate) : round(3.6 * rate)] = 0
    assert 2.55 < SileroCut(hears_tones)(waveform, rate) / rate < 3.15
    assert quietest(waveform, rate) / rate == pytest.approx(3.55, abs=0.2)


def test_of_several_pauses_the_quietest_is_cut() -> None:
    waveform = torch.full((4 * RATE,), 0.5)
    for start_s, level in ((2.2, -0.3), (2.9, -0.02), (3.5, -0.1)):
        waveform[round(start_s * RATE) :][: round(0.4 * RATE)] = level
    assert SileroCut(hears_tones)(waveform, RATE) / RATE == pytest.approx(3.1, abs=0.1)
    speech = torch.full((4 * RATE,), 0.5)
    speech[round(3.2 * RATE) : round(3.3 * RATE)] = -0.5  # too short for a pause, but where the least is heard
    assert SileroCut(hears_tones)(speech, RATE) / RATE == pytest.approx(3.25, abs=0.2)


def test_the_last_frame_is_filled_up_and_short_recordings_have_a_cut() -> None:
    silero = SileroCut(hears_tones)
    speech = torch.cat([torch.ones(FRAME), -torch.ones(FRAME), torch.ones(FRAME // 2)])
    assert silero.probabilities(speech).tolist() == [1, 0, 1]
    for samples in (2, 100, 1_000):
        assert samples // 2 <= silero(torch.ones(samples), RATE) <= samples


def test_silero_from_its_package() -> None:
    pytest.importorskip("onnxruntime", reason="needs the vad extra")
    pytest.importorskip("silero_vad.data", reason="needs the vad extra")
    silero = load_cut("silero")
    found = silero.probabilities(0.1 * torch.randn(RATE))
    assert found.shape == (32,) and found.min() >= 0 and found.max() < 0.5  # noise is no speech


def test_what_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_cut(None) is quietest
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ImportError, match=r'pip install "speechllm\[vad\]"'):
            load_cut("silero")
    pytest.importorskip("onnxruntime", reason="needs the vad extra")
    with pytest.raises(InputError, match="^--vad no.onnx: no such file; `--vad silero` takes the one in the package"):
        load_cut("no.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(InputError, match=r"^--vad .*text.onnx is no Silero VAD of version 5 or later as ONNX: "):
        load_cut(str(tmp_path / "text.onnx"))
