"""What stands before every request: the key, limits on size and number, and the counting of what was answered."""

import asyncio
import contextlib
import hmac
import json
import math
import time
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from speechllm.serving.hosts import is_own_page

OPEN = ("/health",)  # asked by what watches over a server, which has no key
RETRY_S = 1  # after which a caller may try again
LINGER_S = 1.0  # for the body of a refused request, and for the last event of a stream
EVENTS = "text/event-stream"
MEGABYTE = 10**6
MOST_MEGABYTES_OF_JSON = 4  # 180 s of codes are one


@dataclass(frozen=True)
class Limits:
    """What one server takes on: requests at a time, and for each megabytes, seconds of speech and seconds of time."""

    requests: int = 64
    megabytes: float = 512.0
    duration_s: float = 7200.0
    time_s: float = 3600.0


class Metrics:
    """What `/metrics` shows, of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("speechllm_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "speechllm_request_seconds", "Time until a request is answered.", ["path"], registry=registry
        )
        self.in_flight = Gauge("speechllm_requests_in_flight", "Requests in progress.", registry=registry)
        self.speech = Counter("speechllm_speech_seconds", "Seconds of speech transcribed.", registry=registry)
        self.batches = Histogram(
            "speechllm_batch_size",
            "Utterances transcribed together.",
            buckets=[1, 2, 4, 8, 16, 32, 64],
            registry=registry,
        )


class Refused(HTTPException):
    """A request that is answered with a status of HTTP's, one line on why, and a word for programs."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(status, message)
        self.code = code


def error_content(status: int, message: str, code: str | None = None) -> dict[str, dict[str, str | None]]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": " ".join(message.split()), "type": kind, "param": None, "code": code}}


def event(kind: str, **content: Any) -> str:
    """A server-sent event as OpenAI's clients read them."""
    return f"data: {json.dumps({'type': kind, **content})}\n\n"


class Door:
    """ASGI middleware that refuses before anything is worked on: without the key, or when too much is asked at once.

    A body is refused when it turns out to be too long, also where no length was stated.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        paths: frozenset[str],
        uploads: frozenset[str],
        key: str | None = None,
    ):
        """paths: those that are counted under their own name; uploads: those of them that take files.

        key: what callers must show as bearer token, if any.
        """
        self.app, self.limits, self.metrics, self.paths, self.uploads = app, limits, metrics, paths, uploads
        self.key = key.encode() if key else None
        self.working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        status, streams, started = "", False, time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal status, streams
            if message["type"].endswith("http.response.start"):
                status = str(message["status"])
                streams = dict(message["headers"]).get(b"content-type", b"").startswith(EVENTS.encode())
            elif message["type"] == "websocket.accept":
                status = "101"
            await send(message)

        works = scope["type"] == "websocket" or scope["method"] == "POST"
        self.working += works
        self.metrics.in_flight.set(self.working)
        try:
            if refused := self._refused(scope):
                self.working -= works
                works = False  # what is refused takes nobody's place
                if scope["type"] == "http":
                    await _read_on(receive)
                await _refuse(refused, scope, observed)
            else:
                async with asyncio.timeout(None if scope["type"] == "websocket" else self.limits.time_s):
                    await self.app(scope, self._bounded(scope, receive), observed)
        except TimeoutError:
            late = Refused(504, "this took longer than the server allows", "timeout")
            if not status:
                await _refuse(late, scope, observed)
            elif streams:
                await _end_events(late, send)
            status = "504"  # also of what had begun as 200
        except Exception:
            status = status or "500"  # the answer is given outside of this
            raise
        finally:
            self.working -= works
            self.metrics.in_flight.set(self.working)
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def _refused(self, scope: Scope) -> Refused | None:
        headers = dict(scope["headers"])
        shown = headers.get(b"authorization", b"")
        if self.key and scope["path"] not in OPEN and not hmac.compare_digest(shown, b"Bearer " + self.key):
            return Refused(401, "expected the server's key in the header Authorization: Bearer KEY", "invalid_api_key")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not self.key and origin and not is_own_page(origin):
            return Refused(403, "a page from elsewhere may only ask a server that has a key", "forbidden_origin")
        if self.working > self.limits.requests:
            return Refused(429, f"{self.limits.requests} requests are in progress: try again later", "busy")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most_bytes(scope):
            return self._too_large(scope)
        return None

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        size, most = 0, self._most_bytes(scope)

        async def read() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise self._too_large(scope)
            return message

        return read

    def _most_bytes(self, scope: Scope) -> float:
        """Of a body; one that holds no file is short, but where nobody reads it."""
        short = scope["path"] in self.paths and not self._holds_file(scope)
        return MEGABYTE * min(self.limits.megabytes, MOST_MEGABYTES_OF_JSON if short else math.inf)

    def _holds_file(self, scope: Scope) -> bool:
        kind = dict(scope["headers"]).get(b"content-type", b"")
        return scope["path"] in self.uploads and kind.startswith(b"multipart/")

    def _too_large(self, scope: Scope) -> Refused:
        advice = ": split the recording" if self._holds_file(scope) else ""
        return Refused(413, f"at most {self._most_bytes(scope) / MEGABYTE:g} MB are taken{advice}", "too_large")


async def _read_on(receive: Receive) -> None:
    """Read the body of a refused request, unless it is long or slow.

    A connection that is closed on bytes that nobody has read is reset, and the caller may never see the answer.
    """
    size, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while more and size < MEGABYTE:
                message = await receive()
                size, more = size + len(message.get("body", b"")), message.get("more_body", False)


async def _end_events(refused: Refused, send: Send) -> None:
    """Let an error be the last event of a stream, unless nobody reads it: then a buffer is full, and sending waits."""
    content = event("error", **error_content(refused.status_code, refused.detail, refused.code))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            await send({"type": "http.response.body", "body": content.encode()})


async def _refuse(refused: Refused, scope: Scope, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if refused.status_code == 429:
        headers.append((b"retry-after", b"%d" % RETRY_S))
    if refused.status_code == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    content = json.dumps(error_content(refused.status_code, refused.detail, refused.code)).encode()
    await send({"type": f"{kind}.start", "status": refused.status_code, "headers": headers})
    await send({"type": f"{kind}.body", "body": content})
