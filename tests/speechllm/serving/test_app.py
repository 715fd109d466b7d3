"""The server: OpenAI's protocol, the codec's paths, limits, and one line for everything that is wrong."""

import asyncio
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import soundfile
import torch
import uvicorn
from fastapi import Request
from fastapi.testclient import TestClient
from pydantic import ValidationError
from torch import Tensor

import speechllm
from speechllm import SpeechLLM, convert_voice, load_audio, reconstruct, save_audio, transcribe
from speechllm.cli.main import main
from speechllm.pauses import quietest
from speechllm.pieces import pieces
from speechllm.serving import app as app_module
from speechllm.serving import door
from speechllm.serving.answers import Segment
from speechllm.serving.app import TRANSCRIPTIONS, Service, make_app, while_connected
from speechllm.serving.door import Limits, Refused
from speechllm.serving.hosts import is_loopback

ROOT = Path(__file__).resolve().parents[3]
RATE = 16_000


def named(**files: Path) -> dict[str, tuple[str, bytes]]:
    return {field: (file.name, file.read_bytes()) for field, file in files.items()}


def ask(client: TestClient, file: Path, **form: object) -> object:
    return client.post(TRANSCRIPTIONS, files=named(file=file), data={"model": "tiny", **form})


def refusal(response: object) -> tuple[int, str]:
    """Status and message; an error is one line in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert "Traceback" not in response.text and "/tmp" not in response.text
    return response.status_code, error["message"]


# ---- transcription


def test_a_recording_is_answered_as_transcribe_does(client: TestClient, recording: Path, speech_llm: SpeechLLM) -> None:
    (text,) = transcribe([recording], speech_llm)
    response = ask(client, recording)
    assert (response.status_code, response.json()) == (200, {"text": text})
    verbose = ask(client, recording, response_format="verbose_json", language="en").json()
    assert verbose["segments"] == [{"id": 0, "start": 0, "end": 1, "text": text}]
    assert (verbose["language"], verbose["duration"]) == ("en", 1)
    assert ask(client, recording, response_format="text").text == text + "\n"
    assert ask(client, recording, response_format="vtt").text.startswith("WEBVTT\n\n")


@pytest.fixture
def long_recording(tmp_path: Path, noise: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five seconds, which are cut as if thirty were too many."""
    monkeypatch.setattr(app_module, "pieces", lambda *words, **more: pieces(*words, **more, longest_s=2))
    save_audio(tmp_path / "long.wav", noise(5 * RATE, seed=3)[0])
    return tmp_path / "long.wav"


def test_a_long_one_is_answered_in_pieces_in_their_order(
    client: TestClient, long_recording: Path, speech_llm: SpeechLLM
) -> None:
    parts = list(pieces(long_recording, RATE, longest_s=2))
    texts = transcribe([part.waveform for part in parts], speech_llm)
    segments = ask(client, long_recording, response_format="verbose_json").json()["segments"]
    assert [segment["text"] for segment in segments] == texts and len(texts) > 2
    assert [segment["start"] for segment in segments] == [round(part.start_s, 3) for part in parts]


def test_a_stream_sends_the_text_of_each_piece_and_then_all(client: TestClient, long_recording: Path) -> None:
    whole = ask(client, long_recording).json()["text"]
    response = ask(client, long_recording, stream="true")
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert [event["type"] for event in events] == ["transcript.text.delta"] * (len(events) - 1) + [
        "transcript.text.done"
    ]
    assert "".join(event["delta"] for event in events[:-1]) == events[-1]["text"] == whole


def test_an_error_in_a_stream_is_its_last_event(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "no.wav").write_bytes(b"no sound")
    (event,) = ask(client, tmp_path / "no.wav", stream="true").text.strip().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["message"].startswith("no.wav: not a readable audio file")


@pytest.mark.parametrize(
    "form, status, message",
    [
        ({"model": "whisper-1"}, 404, "there is no model 'whisper-1' here, but 'tiny'"),
        ({"prompt": "Names: Ann"}, 400, 'prompt: the model answers "Transcribe'),
        ({"temperature": "0.4"}, 400, "temperature: answers are not drawn at random"),
        ({"temperature": "warm"}, 400, "temperature: "),
        ({"response_format": "docx"}, 400, "response_format: "),
        ({"timestamp_granularities[]": ["segment", "word"]}, 400, "timestamp_granularities[]: there are times of segm"),
    ],
)
def test_what_cannot_be_done_is_refused(
    client: TestClient, recording: Path, form: dict, status: int, message: str
) -> None:
    found, said = refusal(ask(client, recording, **form))
    assert found == status and said.startswith(message)


def test_a_file_that_is_missing_or_unusable_is_refused_by_the_name_its_sender_gave(
    client: TestClient, tmp_path: Path
) -> None:
    assert refusal(client.post(TRANSCRIPTIONS, data={"model": "tiny"})) == (400, "file: Field required")
    for name, content in {"empty.wav": b"", "no.mp3": b"x" * 999, "quiet.wav": _wav(torch.zeros(RATE))}.items():
        response = client.post(TRANSCRIPTIONS, files={"file": (name, content)}, data={"model": "tiny"})
        status, message = refusal(response)
        assert status == 400 and message.startswith(f"{name}: ")
    assert refusal(client.post(TRANSCRIPTIONS, content=b"nonsense", headers={"content-type": "multipart/form-data"}))[
        0
    ] in (400, 422)
    assert refusal(client.get("/nowhere"))[0] == 404 and refusal(client.get(TRANSCRIPTIONS))[0] == 405


def _wav(waveform: Tensor) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, waveform.numpy(), RATE, format="WAV")
    return content.getvalue()


# ---- the codec


def test_the_codec_encodes_decodes_reconstructs_and_converts(
    client: TestClient, recording: Path, speech_llm: SpeechLLM, tmp_path: Path, noise: Callable[..., Tensor]
) -> None:
    codec, waveform = speech_llm.codec, load_audio(recording)
    encoded = client.post("/v1/codec/encode", files=named(file=recording)).json()
    codes = codec.encode(waveform[None])
    assert encoded["codes"] == codes.ids[0].tolist() and encoded["samples"] == len(waveform)
    assert _same(client.post("/v1/codec/decode", json=encoded), codec.decode(codes)[0])
    one = client.post("/v1/codec/reconstruct", files=named(file=recording), data={"layers": "1"})
    assert _same(one, reconstruct(codec, waveform, [1])[1])
    save_audio(tmp_path / "b.wav", noise(9_000, seed=5)[0])
    files = named(source=recording, target=tmp_path / "b.wav")
    other = convert_voice(codec, waveform, load_audio(tmp_path / "b.wav"), [1], "content")
    assert _same(client.post("/v1/codec/convert", files=files, data={"matching": "content"}), other)


def _same(response: object, waveform: Tensor) -> bool:
    found, rate = soundfile.read(io.BytesIO(response.content), dtype="float32")
    assert rate == RATE and response.headers["content-type"] == "audio/wav"
    return torch.allclose(torch.from_numpy(found), waveform.detach().clamp(-1, 1), atol=1e-4)


@pytest.mark.parametrize(
    "body, message",
    [
        ({"codes": [[1, 2], [3]]}, "codes: expected as many in every layer"),
        ({"codes": [[]]}, "codes: expected as many in every layer"),
        ({"codes": [[10**6]]}, "codes must be 0.."),
        ({"codes": [[-1]]}, "codes.0.0: "),
        ({"codes": [[1]] * 99}, "expected codes long"),
        ({"codes": [[1]], "samples": 10**9}, "1000000000 samples are more than 1 frames of codes hold"),
        ({"codes": [[1]], "samples": 10**30}, "samples: "),
        ({"codes": [[1] * 9001]}, "codes: 9001 frames, at most 180 s are allowed"),
        ({"codes": [[1]], "codec": "another"}, "codec: these codes are of codec another"),
        ({}, "codes: Field required"),
    ],
)
def test_codes_that_no_recording_gives_are_refused(client: TestClient, body: dict, message: str) -> None:
    status, said = refusal(client.post("/v1/codec/decode", json=body))
    assert status == 400 and said.startswith(message)


def test_of_many_wrong_codes_the_first_is_named() -> None:
    with pytest.raises(ValidationError) as error:
        app_module.CodesOfRecording(codes=[[1, -1, 2**40, -1], [-1] * 1000])
    assert [one["loc"] for one in error.value.errors()] == [("codes", 0, 1)]


def test_a_sound_may_be_longer_than_its_frames_by_part_of_one(client: TestClient, speech_llm: SpeechLLM) -> None:
    hop = round(RATE / speech_llm.codec.frame_rate)
    response = client.post("/v1/codec/decode", json={"codes": [[1, 2, 3]], "samples": 3 * hop + hop // 2})
    found, _ = soundfile.read(io.BytesIO(response.content))
    assert len(found) == 3 * hop + hop // 2 and not found[3 * hop :].any()


def test_layers_that_are_none_are_refused(client: TestClient, recording: Path) -> None:
    for layers in ("a", "0", "99"):
        response = client.post("/v1/codec/reconstruct", files=named(file=recording), data={"layers": layers})
        assert refusal(response)[0] == 400


# ---- limits


def test_without_the_key_only_the_health_is_told(speech_llm: SpeechLLM, recording: Path) -> None:
    header = "Authorization: Bearer KEY"
    with TestClient(make_app(speech_llm, "tiny", key="secret")) as client:
        assert client.get("/health").json() == {"status": "ok"}
        for path in ("/v1/models", "/metrics", "/docs"):
            assert refusal(client.get(path)) == (401, f"expected the server's key in the header {header}")
        assert client.get("/v1/models", headers={"Authorization": "Bearer secre"}).status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert ask(client, recording).status_code == 200


def test_uploads_and_recordings_have_limits(speech_llm: SpeechLLM, recording: Path, tmp_path: Path) -> None:
    limits = Limits(megabytes=0.02, duration_s=0.5)
    with TestClient(make_app(speech_llm, "tiny", limits), raise_server_exceptions=False) as client:
        content = _wav(torch.rand(12_000) - 0.5)
        response = client.post(TRANSCRIPTIONS, files={"file": ("a.wav", content)}, data={"model": "tiny"})
        assert refusal(response) == (413, "at most 0.02 MB are taken: split the recording")
        unstated = client.post(TRANSCRIPTIONS, content=(b"x" * 9_000 for _ in range(3)), headers=_boundary())
        assert refusal(unstated)[0] == 413
        content = _wav(torch.rand(9_000) - 0.5)
        response = client.post(TRANSCRIPTIONS, files={"file": ("a.wav", content)}, data={"model": "tiny"})
        assert refusal(response) == (
            400,
            "a.wav: 0.6 s long, at most 0.5 s are allowed: split it or raise the limit",
        )


def _boundary() -> dict[str, str]:
    return {"content-type": "multipart/form-data; boundary=x"}


def test_pages_from_elsewhere_may_not_ask_a_server_without_a_key(client: TestClient, speech_llm: SpeechLLM) -> None:
    for origin in ("http://localhost:7860", "http://[::1]:7860"):
        assert client.get("/v1/models", headers={"Origin": origin}).status_code == 200
    for origin in ("https://example.org", "null", "http://[::1"):
        message = "a page from elsewhere may only ask a server that has a key"
        assert refusal(client.get("/v1/models", headers={"Origin": origin})) == (403, message)
    with TestClient(make_app(speech_llm, "tiny", key="secret")) as client:
        headers = {"Origin": "https://example.org", "Authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_forms_are_small_beside_their_file(client: TestClient, recording: Path) -> None:
    assert refusal(ask(client, recording, language="e" * 10**5))[0] == 400
    assert refusal(ask(client, recording, **{f"field_{i}": "" for i in range(20)}))[0] == 400
    for headers in ({"content-type": "application/json"}, _boundary()):
        response = client.post("/v1/codec/decode", content=b" " * 5_000_000, headers=headers)
        assert refusal(response) == (413, "at most 4 MB are taken")
    form = {"file": ("a.wav", b" " * 5_000_000)}  # which nobody reads, so that its length is not what is wrong
    assert refusal(client.post("/v1/audio/translations", files=form))[0] == 404


def test_what_takes_too_long_is_given_up(speech_llm: SpeechLLM, recording: Path) -> None:
    with TestClient(make_app(speech_llm, "tiny", Limits(time_s=0.0)), raise_server_exceptions=False) as client:
        assert refusal(ask(client, recording)) == (504, "this took longer than the server allows")


def test_a_stream_that_takes_too_long_ends_with_an_error(
    speech_llm: SpeechLLM, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def segments(*_: object) -> AsyncIterator[Segment]:
        yield Segment(0, 1, "hello")
        await asyncio.sleep(60)

    monkeypatch.setattr(Service, "segments", segments)
    with TestClient(make_app(speech_llm, "tiny", Limits(time_s=1.0))) as client:
        response = ask(client, recording, stream="true")
        counted = client.get("/metrics").text
    first, last = (json.loads(line.removeprefix("data: ")) for line in response.text.strip().split("\n\n"))
    assert first == {"type": "transcript.text.delta", "delta": "hello"}
    error = {"message": "this took longer than the server allows", "type": "server_error", "code": "timeout"}
    assert last == {"type": "error", "error": {**error, "param": None}}
    assert re.findall(r"^speechllm_requests_total.*", counted, re.M) == [
        f'speechllm_requests_total{{path="{TRANSCRIPTIONS}",status="504"}} 1.0'
    ]


@pytest.mark.parametrize(
    "kind, reads, ends", [("text/event-stream", True, 1), ("text/event-stream", False, 0), ("audio/wav", True, 0)]
)
def test_what_has_begun_and_takes_too_long_ends_as_its_reader_can_tell(
    kind: str, reads: bool, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "LINGER_S", 0.05)
    sent: list[dict[str, object]] = []

    async def app(scope: dict, receive: object, send: Callable) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]})
        await asyncio.sleep(60)

    async def send(message: dict[str, object]) -> None:
        if sent and not reads:
            await asyncio.sleep(60)
        sent.append(message)

    entrance = door.Door(app, Limits(time_s=0.0), door.Metrics(), frozenset(), frozenset())
    scope = {"type": "http", "method": "POST", "path": TRANSCRIPTIONS, "headers": []}
    asyncio.run(asyncio.wait_for(entrance(scope, None, send), 30))
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * ends]
    assert entrance.working == 0


def test_a_fault_of_the_server_says_nothing_about_it(
    client: TestClient, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "pieces", lambda *words, **more: 1 / 0)
    assert refusal(ask(client, recording)) == (500, "the server failed; its log says why")
    assert f'speechllm_requests_total{{path="{TRANSCRIPTIONS}",status="500"}} 1.0' in client.get("/metrics").text


def test_nothing_is_computed_for_a_caller_who_has_left(speech_llm: SpeechLLM) -> None:
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    with pytest.raises(Refused, match="the caller has left"):
        asyncio.run(while_connected(Request({"type": "http"}, receive), work()))
    assert cancelled == [True]


def test_the_model_does_not_work_for_a_caller_who_has_left(speech_llm: SpeechLLM) -> None:
    service, asked = Service(speech_llm, "tiny", Limits(), 1, quietest, 1, 0.0), Future()
    service.engine.close()
    service.engine = SimpleNamespace(call=lambda work: asked)

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    with pytest.raises(Refused, match="the caller has left"):
        asyncio.run(service.work(Request({"type": "http"}, receive), print))
    assert asked.cancelled()


# ---- over a socket


@pytest.fixture(scope="module")
def openai() -> ModuleType:
    """OpenAI's own client; not imported above, because it takes seconds."""
    return pytest.importorskip("openai")


@pytest.fixture
def address(speech_llm: SpeechLLM) -> Iterator[str]:
    """A server on this machine that takes eight requests at a time."""
    server = uvicorn.Server(uvicorn.Config(make_app(speech_llm, "tiny", Limits(requests=8)), log_level="error"))
    socket = uvicorn.Config(None, port=0).bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    yield f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(30)


def test_openais_own_client_transcribes(
    openai: ModuleType, address: str, recording: Path, speech_llm: SpeechLLM
) -> None:
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    (text,) = transcribe([recording], speech_llm)
    create = client.audio.transcriptions.create
    with recording.open("rb") as file:
        assert create(file=file, model="tiny").text == text
    with recording.open("rb") as file:
        verbose = create(file=file, model="tiny", response_format="verbose_json", language="en")
    assert (verbose.duration, verbose.segments[0].text) == (1, text)
    with recording.open("rb") as file:
        assert [event.type for event in create(file=file, model="tiny", stream=True)][-1] == "transcript.text.done"
    with recording.open("rb") as file, pytest.raises(openai.NotFoundError, match="there is no model"):
        create(file=file, model="gpt-4o-transcribe")
    with pytest.raises(openai.BadRequestError, match="not a readable audio file"):
        create(file=("x.wav", b"no sound"), model="tiny")


def test_the_examples_of_the_document_work(
    address: str, recording: Path, speech_llm: SpeechLLM, capsys: pytest.CaptureFixture
) -> None:
    (text,) = transcribe([recording], speech_llm)
    page = (ROOT / "speechllm" / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"^```\w+\n(.*?)^```", page, re.M | re.S) if "localhost:8000" in block]
    curl, python = (
        block.replace("http://localhost:8000/v1", address).replace("speech.flac", str(recording)).replace("asr", "tiny")
        for block in blocks
    )
    exec(python, {})
    assert capsys.readouterr().out == text + "\n"
    if shutil.which("curl"):
        assert subprocess.check_output(shlex.split(curl), stderr=subprocess.DEVNULL, text=True) == text + "\n"


SERVE = """
import sys
from speechllm.cli import serve
from speechllm.cli.main import main
sys.exit(main(["serve", "tiny/model", "--port", "0", "--max-requests", "2"]))
"""


def test_the_command_serves_until_it_is_told_to_end(
    openai: ModuleType, start_recipe: Callable, speech_llm: SpeechLLM, recording: Path, tmp_path: Path
) -> None:
    speech_llm.save(tmp_path / "tiny" / "model")
    (tmp_path / "serve.py").write_text(SERVE)
    process = start_recipe(str(tmp_path / "serve.py"), "", tmp_path)
    output, said = Path(process.requests[0]["output"]), ""
    while not said.endswith("\n"):
        assert process.poll() is None, process.communicate()
        said = output.read_text() if output.exists() else ""
        time.sleep(0.02)
    name, address = re.fullmatch(r"(\S+) is served at (\S+) \(Ctrl-C ends it\)\n", said).groups()
    client = openai.OpenAI(base_url=address, api_key="none")
    (text,) = transcribe([recording], speech_llm)
    assert client.audio.transcriptions.create(file=recording, model=name).text == text and name == "tiny"
    process.send(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors


def test_beams_and_letters_reach_what_decodes(
    speech_llm: SpeechLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    told: list[object] = []

    def engine(model: SpeechLLM, batch_size: int, observe: object, *decoding: object) -> SimpleNamespace:
        told.append(decoding)
        return SimpleNamespace(codec=model.codec)

    def app(*_: object, **decoding: object) -> None:
        told.append(decoding)
        raise ValueError("enough")

    monkeypatch.setattr(app_module, "Engine", engine)
    make_app(speech_llm, "tiny", beams=4, letters_weight=0.15)
    monkeypatch.setattr(app_module, "make_app", app)
    monkeypatch.setattr(speechllm, "load_speech_llm", lambda *_, **more: told.append(more) or speech_llm, raising=False)
    assert main(["serve", "model", "--port", "0", "--beams", "3", "--letters-weight", "0.5", "--letters", "l"]) == 1
    assert told == [(4, 0.15), {"letters": "l"}, {"beams": 3, "letters_weight": 0.5}]
    assert main(["serve", "model", "--port", "0", "--letters", "l"]) == 1
    assert "--letters without --letters-weight changes nothing" in capsys.readouterr().err


def test_a_host_that_others_reach_needs_a_key(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPEECHLLM_API_KEY", raising=False)
    assert main(["serve", "model", "--host", "0.0.0.0"]) == 1
    assert "can be reached by others: give --api-key or set SPEECHLLM_API_KEY" in capsys.readouterr().err
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.org")] == [
        *(True, True, True),
        *(False, False, False),
    ]


def test_many_at_once_are_all_answered_rightly_or_told_to_wait(
    openai: ModuleType,
    address: str,
    tmp_path: Path,
    noise: Callable[..., Tensor],
    speech_llm: SpeechLLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [tmp_path / f"{i}.flac" for i in range(5)]
    for i, file in enumerate(files):
        save_audio(file, noise(3_000 + 500 * i, seed=i)[0])
    expected = transcribe(files, speech_llm)
    patient = openai.OpenAI(base_url=address, api_key="none", max_retries=20)
    hasty = patient.with_options(max_retries=0)

    def text_of(i: int) -> str:
        return patient.audio.transcriptions.create(file=files[i % 5], model="tiny").text

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(text_of, range(30))) == [expected[i % 5] for i in range(30)]

    def status_of(i: int) -> tuple[int, str | None]:
        try:
            hasty.audio.transcriptions.create(file=files[i % 5], model="tiny")
        except openai.RateLimitError as error:
            return 429, error.response.headers["retry-after"]
        return 200, None

    def slow(*words: object, **more: object) -> Iterator[object]:  # so that more than eight are there at once
        time.sleep(0.5)
        yield from pieces(*words, **more)

    monkeypatch.setattr(app_module, "pieces", slow)
    with ThreadPoolExecutor(24) as pool:
        statuses = list(pool.map(status_of, range(48)))
    assert set(statuses) == {(200, None), (429, "1")} and statuses.count((200, None)) >= 8


@pytest.mark.parametrize("chunk, chunks, read", [(1000, 5, 5), (300_000, 100, 4), (None, 1, 1)])
def test_what_is_refused_is_read_before_the_answer_unless_it_is_long_or_slow(
    chunk: int | None, chunks: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "LINGER_S", 0.05)
    entrance = door.Door(None, Limits(), door.Metrics(), frozenset(), frozenset(), key="key")
    happened: list[object] = []

    async def receive() -> dict[str, object]:
        happened.append("read")
        if chunk is None:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": bytes(chunk), "more_body": happened.count("read") < chunks}

    async def send(message: dict[str, object]) -> None:
        happened.append(message.get("status"))
        assert entrance.working == 0  # it takes nobody's place

    scope = {"type": "http", "method": "POST", "path": TRANSCRIPTIONS, "headers": []}
    asyncio.run(entrance(scope, receive, send))
    assert happened == [*["read"] * read, 401, None] and entrance.working == 0


def test_the_metrics_count_what_was_answered(client: TestClient, recording: Path) -> None:
    ask(client, recording)
    ask(client, recording, model="another")
    client.get("/v1/nowhere/at/all")
    lines = client.get("/metrics").text.splitlines()
    assert f'speechllm_requests_total{{path="{TRANSCRIPTIONS}",status="200"}} 1.0' in lines
    assert f'speechllm_requests_total{{path="{TRANSCRIPTIONS}",status="404"}} 1.0' in lines
    assert 'speechllm_requests_total{path="other",status="404"} 1.0' in lines
    assert "speechllm_speech_seconds_total 1.0" in lines and "speechllm_requests_in_flight 0.0" in lines
