"""The HTTP interface: transcription as OpenAI's clients ask for it, and a codec's codes and sounds beside it."""

import asyncio
import contextlib
import itertools
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from fastapi import FastAPI, File, Form, Request, Response, UploadFile, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, FailFast, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from torch import Tensor

from speechllm.model import SpeechLLM
from speechllm.pauses import Cut, quietest
from speechllm.pieces import Piece, pieces
from speechllm.serving import answers
from speechllm.serving.answers import Segment
from speechllm.serving.door import EVENTS, Door, Limits, Metrics, Refused, error_content, event
from speechllm.serving.engine import Engine
from speechllm.serving.live import LiveSpeech, transcribe_live
from tokenizer.audio import RATES, AudioError, audio_content, load_audio
from tokenizer.errors import InputError
from tokenizer.interface import Codec, Codes, DiscreteTokenizer
from tokenizer.metrics.conversion import convert_voice
from tokenizer.metrics.quality import layer_counts, reconstruct
from tokenizer.settings import layer_numbers

T = TypeVar("T")
TRANSCRIPTIONS, LIVE = "/v1/audio/transcriptions", "/v1/audio/live"
ENCODE, RECONSTRUCT, CONVERT = "/v1/codec/encode", "/v1/codec/reconstruct", "/v1/codec/convert"
UPLOADS = frozenset({TRANSCRIPTIONS, ENCODE, RECONSTRUCT, CONVERT})  # which take files
FORM_LIMITS: Any = {"max_files": 2, "max_fields": 16, "max_part_size": 2**16}
WHOLE_S = 180.0  # longest recording for the codec's own paths, which take it as a whole

Code = Annotated[int, Field(ge=0, lt=2**31)]
Recording = Annotated[UploadFile, File(description="an audio file: FLAC, WAV, Ogg Vorbis or Opus, MP3")]


class CodesOfRecording(BaseModel):
    """Codes [layers][frames] of the server's codec and the number of samples that they were made from."""

    # of the first wrong code alone, because a body may hold a million
    codes: Annotated[list[Annotated[list[Code], FailFast()]], FailFast()] = Field(min_length=1)
    samples: int | None = Field(None, ge=1, lt=2**48)
    codec: str | None = None  # the fingerprint of the codec that made them, if it is to be checked


class Service:
    """A model, the thread that it works in, and what is done with an upload."""

    def __init__(
        self,
        speech_llm: SpeechLLM,
        name: str,
        limits: Limits,
        batch_size: int,
        cut: Cut,
        beams: int,
        letters_weight: float,
    ):
        self.name, self.limits, self.cut, self.metrics = name, limits, cut, Metrics()
        self.engine = Engine(speech_llm, batch_size, self.metrics.batches.observe, beams, letters_weight)
        self.codec = self.engine.codec
        self.fingerprint = self.codec.fingerprint  # of all weights: once

    def check_model(self, model: str) -> None:
        if model != self.name:
            raise Refused(404, f"there is no model {model!r} here, but {self.name!r}", "model_not_found")

    def discrete(self) -> DiscreteTokenizer:
        if not isinstance(self.codec, DiscreteTokenizer):
            raise Refused(404, "this model's audio tokenizer has no codes", "no_codes")
        return self.codec

    def decoder(self) -> Codec:
        if not isinstance(self.codec, Codec):
            raise Refused(404, "this model's audio tokenizer cannot turn its tokens into speech again", "no_decoder")
        return self.codec

    async def segments(self, path: Path) -> AsyncIterator[Segment]:
        """The texts of a recording's pieces as they come; no more of them than a batch are in memory."""
        rate, limit = self.codec.sample_rate, self.limits.duration_s
        found: Iterator[Piece] = pieces(path, rate, max_duration_s=limit, cut=self.cut)
        while batch := await run_in_threadpool(lambda: [*itertools.islice(found, self.engine.batch_size)]):
            futures = [self.engine.transcribe(piece.waveform) for piece in batch]
            try:
                for piece, future in zip(batch, futures, strict=True):
                    text = (await asyncio.wrap_future(future)).text
                    self.metrics.speech.inc(piece.duration_s)
                    yield Segment(piece.start_s, piece.end_s, text)
            finally:
                for future in futures:
                    future.cancel()  # those that nobody waits for any more

    async def transcribed(self, upload: UploadFile) -> list[Segment]:
        async with uploaded(upload) as path:
            return [segment async for segment in self.segments(path)]

    async def waveform(self, upload: UploadFile) -> Tensor:
        """A recording for the codec's own paths, float [N]."""
        async with uploaded(upload) as path:
            limit = min(WHOLE_S, self.limits.duration_s)
            return await run_in_threadpool(load_audio, path, self.codec.sample_rate, max_duration_s=limit)

    async def work(self, request: Request, function: Any, *arguments: Any) -> Any:
        """What a function gives in the model's thread, unless the caller leaves before its turn."""

        async def result() -> Any:
            return await asyncio.wrap_future(self.engine.call(lambda: function(*arguments)))

        return await while_connected(request, result())


@contextlib.asynccontextmanager
async def uploaded(upload: UploadFile) -> AsyncIterator[Path]:
    """An upload as a file while this lasts. What is wrong with it is said of the name that its sender gave."""
    with tempfile.TemporaryDirectory(prefix="speechllm_") as folder:
        path = Path(folder) / "recording"
        with path.open("wb") as file:
            await run_in_threadpool(shutil.copyfileobj, upload.file, file)
        try:
            yield path
        except AudioError as error:
            name = "".join(filter(str.isprintable, upload.filename or "file"))[:100]
            raise Refused(400, f"{name}: {error.detail}", re.sub(r"\W", "_", error.reason)) from error


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which ends when its caller leaves; the request's body must have been read."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(499, "the caller has left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def make_app(
    speech_llm: SpeechLLM,
    name: str,
    limits: Limits | None = None,
    key: str | None = None,
    batch_size: int = 16,
    cut: Cut = quietest,
    beams: int = 1,
    letters_weight: float = 0.0,
) -> FastAPI:
    """The application that `speechllm serve` runs.

    name: of the model, as callers see it; key: that they must show; cut: says where long recordings have pauses.
    beams, letters_weight: see `recognize`.
    """
    service = Service(speech_llm, name, limits or Limits(), batch_size, cut, beams, letters_weight)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.close)

    app = FastAPI(
        title="speechllm", description=f"The speech language model {name}.", lifespan=lifespan, form_limits=FORM_LIMITS
    )
    add_errors(app)
    add_transcription(app, service)
    add_codec(app, service)
    add_watching(app, service)
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", "")))
    app.add_middleware(Door, limits=service.limits, metrics=service.metrics, paths=paths, uploads=UPLOADS, key=key)
    return app


def add_errors(app: FastAPI) -> None:
    """Every error becomes one line in OpenAI's form, and none says where on this machine something lies."""

    async def told(request: Request, error: Exception) -> Response:
        status, message, code = problem(error)
        return JSONResponse(error_content(status, message, code), status)

    for kind in (HTTPException, RequestValidationError, InputError, Exception):
        app.add_exception_handler(kind, told)


def problem(error: Exception) -> tuple[int, str, str | None]:
    """HTTP's status of an error, one line on it, and a word for programs."""
    match error:
        case HTTPException():
            return error.status_code, str(error.detail), getattr(error, "code", None)
        case RequestValidationError():
            first = error.errors()[0]
            return 400, f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: {first['msg']}", "invalid_value"
        case InputError():
            return 400, str(error), "invalid_value"
    return 500, "the server failed; its log says why", None


def add_transcription(app: FastAPI, service: Service) -> None:
    """`POST /v1/audio/transcriptions` and what says which models there are."""
    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "speechllm"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @app.post(TRANSCRIPTIONS, response_model=None)
    async def transcriptions(
        request: Request,
        file: Recording,
        model: Annotated[str, Form(description="the id that /v1/models names")],
        language: Annotated[str, Form(description="is repeated in the answer; the model hears what it hears")] = "",
        prompt: Annotated[str, Form(description='none: the model answers "Transcribe this speech"')] = "",
        response_format: Annotated[answers.Form, Form()] = "json",
        temperature: Annotated[float, Form(description="0: the answer is not drawn at random")] = 0.0,
        stream: Annotated[bool, Form(description="texts as they come, as server-sent events")] = False,
        timestamps: Annotated[
            list[str], Form(alias="timestamp_granularities[]", description="segment: words have no times")
        ] = [],  # noqa: B006
    ) -> Response:
        service.check_model(model)
        if unknown := [kind[:100] for kind in timestamps if kind != "segment"]:
            message = f"timestamp_granularities[]: there are times of segments, not of {unknown[0]!r}"
            raise Refused(400, message, "times")
        if prompt.strip():
            raise Refused(400, 'prompt: the model answers "Transcribe this speech": leave it out', "prompt")
        if temperature:
            raise Refused(400, "temperature: answers are not drawn at random: leave it out or say 0", "temperature")
        if stream:
            return StreamingResponse(_events(service, file), media_type=EVENTS)
        segments = await while_connected(request, service.transcribed(file))
        content, kind = answers.answer(segments, response_format, language)
        return Response(content, media_type=kind)

    @app.websocket(LIVE)
    async def live(socket: WebSocket, model: str, rate: int = 16_000) -> None:
        """Samples as binary messages, 16-bit little-endian at `rate` Hz; texts as JSON; any text message ends it."""
        await socket.accept()
        if model != service.name or rate not in RATES:
            await socket.close(
                1008, f"rate: expected {RATES[0]} to {RATES[-1]} Hz" if model == service.name else "model"
            )
            return
        await transcribe_live(socket, LiveSpeech(service.engine, rate, cut=service.cut), service.limits.duration_s)


async def _events(service: Service, file: UploadFile) -> AsyncIterator[str]:
    """Server-sent events of OpenAI's kinds: the text of each piece as it comes, then the whole one, or an error.

    Where these take too long, the door sends the error.
    """
    segments: list[Segment] = []
    try:
        async with uploaded(file) as path:
            async for segment in service.segments(path):
                space = " " if answers.joined(segments) and segment.text else ""
                segments.append(segment)
                yield event("transcript.text.delta", delta=space + segment.text)
    except Exception as error:  # the status was sent before
        yield event("error", **error_content(*problem(error)))
        if problem(error)[0] == 500:
            raise
    else:
        yield event("transcript.text.done", text=answers.joined(segments))


def add_codec(app: FastAPI, service: Service) -> None:
    """Codes and sounds of the model's codec: encode, decode, reconstruct, convert."""

    @app.post(ENCODE)
    async def encode(request: Request, file: Recording) -> dict[str, Any]:
        """Codes [layers][frames] of a recording."""
        codec, waveform = service.discrete(), await service.waveform(file)
        codes = await service.work(request, lambda: codec.encode(waveform[None].to(codec.device)).ids[0].tolist())
        held = {"codec": service.fingerprint, "frame_rate": codec.frame_rate, "samples": len(waveform)}
        return held | {"codes": codes}

    @app.post("/v1/codec/decode", response_class=Response)
    async def decode(request: Request, body: CodesOfRecording) -> Response:
        """The sound of codes, as a WAV file."""
        codec = service.decoder()
        if body.codec not in (None, service.fingerprint):
            raise Refused(400, f"codec: these codes are of codec {body.codec}, here is {service.fingerprint}", "codec")
        if not body.codes[0] or len(set(map(len, body.codes))) > 1:
            raise Refused(400, "codes: expected as many in every layer, and at least one", "codes")
        frames = len(body.codes[0])
        if frames > WHOLE_S * codec.frame_rate:
            raise Refused(400, f"codes: {frames} frames, at most {WHOLE_S:g} s are allowed", "codes")
        ids, samples = torch.tensor(body.codes)[None], None if body.samples is None else torch.tensor([body.samples])
        codes = Codes(ids, torch.tensor([ids.shape[2]]), samples)
        codes.require(codec.num_codebooks, codec.codebook_size, codec.sample_rate / codec.frame_rate)
        return _sound(await service.work(request, lambda: codec.decode(codes)[0].cpu()), codec.sample_rate)

    @app.post(RECONSTRUCT, response_class=Response)
    async def reconstructed(
        request: Request, file: Recording, layers: Annotated[int | None, Form()] = None
    ) -> Response:
        """A recording as its codes give it back, from so many codebooks (all of them), as a WAV file."""
        codec, waveform = service.decoder(), await service.waveform(file)
        (count,) = layer_counts(codec, [codec.num_codebooks if layers is None else layers])
        sounds = await service.work(request, reconstruct, codec, waveform, [count])
        return _sound(sounds[count], codec.sample_rate)

    @app.post(CONVERT, response_class=Response)
    async def convert(
        request: Request,
        source: Recording,
        target: Recording,
        layers: Annotated[str, Form(description="those to take from the target, as 1,2; 0 is the first")] = "1",
        matching: Annotated[Literal["position", "content", "mean"], Form()] = "position",
    ) -> Response:
        """What the source says in the voice of the target, by taking the codes of `layers` from it, as a WAV file."""
        codec, taken = service.decoder(), layer_numbers(layers)
        waveforms = await service.waveform(source), await service.waveform(target)
        converted = await service.work(request, convert_voice, codec, *waveforms, taken, matching)
        return _sound(converted, codec.sample_rate)


def add_watching(app: FastAPI, service: Service) -> None:
    """What tells whether the server works, and how much."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _sound(waveform: Tensor, sample_rate: int) -> Response:
    return Response(audio_content(waveform, sample_rate), media_type="audio/wav")
