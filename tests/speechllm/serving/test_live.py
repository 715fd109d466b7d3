"""Speech that is still being said: texts while it comes, and at the end those of the whole."""

import asyncio
from collections.abc import Callable

import pytest
import torch
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from torch import Tensor

from speechllm import SpeechLLM, extend_vocabulary, transcribe, transcribe_codes
from speechllm.decoding import Transcription
from speechllm.serving import engine as engine_module
from speechllm.serving.app import LIVE, make_app
from speechllm.serving.door import Limits
from speechllm.serving.engine import Engine
from speechllm.serving.live import MOST_BYTES, LiveSpeech, transcribe_live

RATE = 16_000


def as_bytes(waveform: Tensor) -> bytes:
    return (waveform * 2**15).round().clamp(-(2**15), 2**15 - 1).short().numpy().astype("<i2").tobytes()


def heard(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.int16).float() / 2**15


def events(speech: LiveSpeech, *parts: bytes) -> list[dict]:
    async def collect() -> list[dict]:
        return [event for i, part in enumerate(parts) async for event in speech.add(part, i == len(parts) - 1)]

    return asyncio.run(collect())


@pytest.fixture(params=[True, False], ids=["causal", "looks ahead"])
def speech_llm(
    request: pytest.FixtureRequest, make_codec: Callable, make_qwen2: Callable, text_tokenizer: object
) -> SpeechLLM:
    codec = make_codec(num_codebooks=2, codebook_size=16, causal=request.param)
    model = make_qwen2(text_tokenizer)
    return SpeechLLM(model, text_tokenizer, extend_vocabulary(model, text_tokenizer, codec), codec)


def test_the_last_text_is_that_of_the_whole(
    engine: Engine, speech_llm: SpeechLLM, noise: Callable[..., Tensor]
) -> None:
    content = as_bytes(noise(2 * RATE + 501, seed=0)[0] * 0.3)
    parts = [content[i : i + 3333] for i in range(0, len(content), 3333)]  # also halves of samples
    found = events(LiveSpeech(engine, RATE, interval_s=0.5), *parts)
    (text,) = transcribe([heard(content)], speech_llm)
    *partial, segment, done = found
    assert {event["type"] for event in partial} == {"partial"} and len(partial) == 3
    assert segment == {"type": "segment", "text": text, "start": 0, "end": round(2 + 501 / RATE, 3)}
    assert done == {"type": "done", "text": text, "end": segment["end"]}


def test_only_what_is_settled_is_searched_a_second_time(
    engine: Engine, noise: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []

    def recognize(speech: list[Tensor], *_: object, fallback: bool, **more: object) -> list[Transcription]:
        searched.append(fallback)
        return [Transcription("") for _ in speech]

    monkeypatch.setattr(engine_module, "recognize", recognize)
    content = as_bytes(noise(2 * RATE, seed=0)[0] * 0.3)
    parts = [content[: 2 * RATE], content[2 * RATE :], b""]
    kinds = [event["type"] for event in events(LiveSpeech(engine, RATE), *parts)]
    assert kinds == ["partial", "partial", "segment", "done"]
    assert searched == [False, False, True]


def test_what_is_old_is_settled_and_nothing_is_lost(
    engine: Engine, speech_llm: SpeechLLM, noise: Callable[..., Tensor]
) -> None:
    content = as_bytes(noise(3 * RATE, seed=1)[0] * 0.3)
    speech = LiveSpeech(engine, RATE, longest_s=1, interval_s=9)
    found = events(speech, *[content[i : i + 6400] for i in range(0, len(content), 6400)])
    segments = [event for event in found if event["type"] == "segment"]
    assert len(segments) > 3 and not len(speech.waveform)
    assert [event["start"] for event in segments[1:]] == [event["end"] for event in segments[:-1]]
    assert found[-1]["text"] == " ".join(event["text"] for event in segments if event["text"])
    assert (speech.encoder is not None) == speech_llm.codec.config.causal
    if speech.encoder is not None:  # the codes are those of the whole, cut in time
        (codes,) = [speech_llm.codec.encode(heard(content)[None], layers=1).ids[0]]
        cuts = [round(event["start"] * 50) for event in segments] + [codes.shape[1]]
        parts = [codes[:, a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert [event["text"] for event in segments] == transcribe_codes(parts, speech_llm)


def test_another_rate_is_resampled(engine: Engine, noise: Callable[..., Tensor]) -> None:
    content = as_bytes(noise(8_000, seed=2)[0] * 0.3)
    speech = LiveSpeech(engine, 8_000)
    *_, done = events(speech, content[:5000], content[5000:], b"")
    assert done["end"] == pytest.approx(1.0, abs=0.01)


def test_speech_without_a_sample_is_done_at_once(engine: Engine) -> None:
    assert events(LiveSpeech(engine, RATE), b"") == [{"type": "done", "text": "", "end": 0}]


def test_a_socket_gets_the_texts_and_is_closed(
    client: TestClient, speech_llm: SpeechLLM, noise: Callable[..., Tensor]
) -> None:
    content = as_bytes(noise(RATE, seed=0)[0] * 0.3)
    (text,) = transcribe([heard(content)], speech_llm)
    with client.websocket_connect(f"{LIVE}?model=tiny") as socket:
        for start in range(0, len(content), 4000):
            socket.send_bytes(content[start : start + 4000])
        socket.send_text("end")
        found = [socket.receive_json()]
        while found[-1]["type"] != "done":
            found.append(socket.receive_json())
        with pytest.raises(WebSocketDisconnect):
            socket.receive_json()
    assert found[-1]["text"] == text and found[-2]["type"] == "segment"
    with client.websocket_connect(f"{LIVE}?model=tiny") as socket:  # who leaves early leaves nothing behind
        socket.send_bytes(content)
    for words in ("model=other", "model=tiny&rate=1"):
        with client.websocket_connect(f"{LIVE}?{words}") as socket, pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        assert closed.value.code == 1008
    assert "speechllm_requests_in_flight 0.0" in client.get("/metrics").text


def last_of(socket: object) -> tuple[dict, int]:
    """The last event and the code that a socket is closed with."""
    event = {}
    try:
        while True:
            event = socket.receive_json()
    except WebSocketDisconnect as closed:
        return event, closed.code


def test_speech_has_limits_too(
    speech_llm: SpeechLLM, noise: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = as_bytes(noise(RATE, seed=0)[0] * 0.3)
    with TestClient(make_app(speech_llm, "tiny", Limits(duration_s=1.5))) as client:
        with client.websocket_connect(f"{LIVE}?model=tiny") as socket:
            socket.send_bytes(content)
            assert socket.receive_json()["type"] == "partial"
            socket.send_bytes(content)
            assert last_of(socket) == ({"type": "error", "message": "at most 1.5 s of speech are taken"}, 1008)
        with client.websocket_connect(f"{LIVE}?model=tiny") as socket:
            socket.send_bytes(content[:100])
            socket.send_bytes(b"x" * (MOST_BYTES + 1))
            assert last_of(socket)[0]["type"] == "done"
        monkeypatch.setattr("speechllm.serving.live.SILENCE_S", 0.05)
        with client.websocket_connect(f"{LIVE}?model=tiny") as socket:
            assert last_of(socket) == ({"type": "error", "message": "nothing was said for 0.05 s"}, 1008)


def test_a_fault_is_told_and_not_taken_for_a_speaker_who_left(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    class Socket:
        async def receive_bytes(self) -> bytes:
            return b"1234"

        async def send_json(self, event: dict) -> None:
            sent.append(event)

        async def close(self, code: int = 1000) -> None:
            sent.append(code)

    def fail(*words: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(LiveSpeech, "_samples", fail)
    with pytest.raises(RuntimeError, match="out of memory"):  # which goes to the log
        asyncio.run(transcribe_live(Socket(), LiveSpeech(engine, RATE), 60))
    assert sent == [{"type": "error", "message": "the server failed; its log says why"}, 1011]


def test_who_does_not_read_has_left(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speechllm.serving.live.SILENCE_S", 0.05)

    class Deaf:
        """A socket whose answers nobody takes."""

        sent = 0

        async def receive_bytes(self) -> bytes:
            return as_bytes(torch.rand(RATE) * 0.3) if not self.sent else await asyncio.sleep(60)

        async def send_json(self, event: dict) -> None:
            self.sent += 1
            await asyncio.sleep(60)

        async def close(self, code: int = 1000) -> None:
            raise AssertionError("nobody is there")

    socket = Deaf()
    asyncio.run(asyncio.wait_for(transcribe_live(socket, LiveSpeech(engine, RATE), 100.0), 30))
    assert socket.sent == 1


def test_nothing_is_transcribed_for_a_speaker_who_has_left(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    added = []

    class Socket:
        def __init__(self, *content: bytes):
            self.content = iter(content)

        async def receive_bytes(self) -> bytes:
            if content := next(self.content, b""):
                return content
            raise WebSocketDisconnect

    monkeypatch.setattr(LiveSpeech, "add", lambda *words: added.append(words))
    for socket in (Socket(), Socket(b"1234", b"5678")):
        asyncio.run(transcribe_live(socket, LiveSpeech(engine, RATE), 60))
    assert not added


def test_many_seconds_at_once_are_encoded_one_after_the_other(
    speech_llm: SpeechLLM, noise: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, seen = as_bytes(noise(2 * RATE, seed=0)[0] * 0.3), []
    (text,) = transcribe([heard(content)], speech_llm)
    monkeypatch.setattr("speechllm.serving.live.STEP_S", 0.3)
    original = LiveSpeech._samples
    monkeypatch.setattr(LiveSpeech, "_samples", lambda *words: seen.append(len(words[1])) or original(*words))
    with TestClient(make_app(speech_llm, "tiny")) as client, client.websocket_connect(f"{LIVE}?model=tiny") as socket:
        socket.send_bytes(content)
        socket.send_text("end")
        assert last_of(socket)[0]["text"] == text
    assert max(seen) == 9600 and sum(seen) == len(content)


def test_a_socket_needs_the_key_too(speech_llm: SpeechLLM) -> None:
    with TestClient(make_app(speech_llm, "tiny", key="secret")) as client:
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(f"{LIVE}?model=tiny"):
            pass
        assert denied.value.status_code == 401
        with client.websocket_connect(f"{LIVE}?model=tiny", headers={"Authorization": "Bearer secret"}) as socket:
            socket.send_text("end")
            assert socket.receive_json()["type"] == "done"
