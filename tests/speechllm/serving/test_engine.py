"""One thread for many callers: batches, equal answers, and errors that stay with their cause."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from speechllm import SpeechLLM, transcribe
from speechllm.serving import engine as engine_module
from speechllm.serving.engine import Engine


@pytest.fixture
def waveforms(noise: Callable[..., Tensor]) -> list[Tensor]:
    return [noise(3_000 + 900 * i, seed=i)[0] for i in range(7)]


@pytest.fixture
def sizes() -> list[int]:
    return []


@pytest.fixture
def engine(speech_llm: SpeechLLM, sizes: list[int]) -> Iterator[Engine]:
    engine = Engine(speech_llm, batch_size=4, observe=sizes.append)
    yield engine
    engine.close()


def hold(engine: Engine) -> tuple[threading.Event, Future]:
    """Keep the engine busy until the event is set."""
    go, busy = threading.Event(), threading.Event()
    future = engine.call(lambda: (busy.set(), go.wait(30)))
    assert busy.wait(30)
    return go, future


def test_what_waits_is_transcribed_together_and_as_alone(
    engine: Engine, speech_llm: SpeechLLM, waveforms: list[Tensor], sizes: list[int]
) -> None:
    go, _ = hold(engine)
    futures = [engine.transcribe(waveform) for waveform in waveforms]
    go.set()
    assert [future.result(60).text for future in futures] == transcribe(waveforms, speech_llm)
    assert sizes == [4, 3]


def test_encoded_speech_gets_the_text_of_its_waveform(
    engine: Engine, speech_llm: SpeechLLM, waveforms: list[Tensor]
) -> None:
    encoded = speech_llm.vocabulary.encoding.encode(speech_llm.codec, waveforms[3])
    found = engine.recognize(encoded, len(waveforms[3]) / speech_llm.codec.sample_rate)
    assert found.result(60) == engine.transcribe(waveforms[3]).result(60)


def test_one_that_fails_does_not_take_the_others_along(
    engine: Engine, waveforms: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def recognized(utterances: list) -> list:
        if any(len(utterance.waveform) == len(waveforms[1]) for utterance in utterances):
            raise RuntimeError("out of memory")
        return [SimpleNamespace(text=str(len(utterance.waveform))) for utterance in utterances]

    monkeypatch.setattr(engine, "_recognized", recognized)
    go, _ = hold(engine)
    futures = [engine.transcribe(waveform) for waveform in waveforms[:3]]
    failing = engine.call(lambda: 1 / 0)
    go.set()
    assert [futures[i].result(60).text for i in (0, 2)] == [str(len(waveforms[i])) for i in (0, 2)]
    with pytest.raises(RuntimeError, match="out of memory"):
        futures[1].result(60)
    with pytest.raises(ZeroDivisionError):
        failing.result(60)
    assert torch.is_inference_mode_enabled() is False and engine.call(lambda: 5).result(60) == 5


def test_only_who_wants_it_has_a_second_search_and_not_the_others_of_the_batch(
    engine: Engine, waveforms: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []

    def recognize(speech: list[Tensor], *_: object, fallback: bool, **more: object) -> list[SimpleNamespace]:
        searched.append((fallback, len(speech)))
        return [SimpleNamespace(text=str(duration_s)) for duration_s in more["durations_s"]]

    monkeypatch.setattr(engine_module, "recognize", recognize)
    go, _ = hold(engine)
    codes = torch.zeros(1, 4).long()
    futures = [
        engine.transcribe(waveforms[0]),
        engine.recognize(codes, 1.5, fallback=False),
        engine.transcribe(waveforms[1], fallback=False),
        engine.recognize(codes, 2.5),
    ]
    go.set()
    durations_s = [len(waveforms[0]) / 16_000, 1.5, len(waveforms[1]) / 16_000, 2.5]
    assert [future.result(60).text for future in futures] == [str(duration_s) for duration_s in durations_s]
    assert searched == [(False, 2), (True, 2)]


def test_what_was_cancelled_is_not_computed(engine: Engine, waveforms: list[Tensor], sizes: list[int]) -> None:
    go, _ = hold(engine)
    cancelled, kept = engine.transcribe(waveforms[0]), engine.transcribe(waveforms[1])
    assert cancelled.cancel()
    go.set()
    assert kept.result(60) and sizes == [1]


def test_closing_ends_what_is_computed_and_cancels_what_waits(
    speech_llm: SpeechLLM, waveforms: list[Tensor], sizes: list[int]
) -> None:
    engine = Engine(speech_llm, batch_size=4, observe=sizes.append)
    go, computed = hold(engine)
    waiting = [engine.transcribe(waveform) for waveform in waveforms[:6]]  # more than a batch
    waiting.append(engine.call(lambda: 5))
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        engine.transcribe(waveforms[2])
    go.set()
    closing.join(30)
    assert not closing.is_alive() and computed.result(0) and sizes == []
    assert all(future.cancelled() for future in waiting)


def test_a_model_without_its_codec_is_refused(speech_llm: SpeechLLM) -> None:
    speech_llm.codec = None
    with pytest.raises(ValueError, match="has no codec"):
        Engine(speech_llm)
