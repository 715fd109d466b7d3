"""Speech that is still being said: samples come in, texts go out, while a WebSocket is open."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import soxr
import torch
from fastapi import WebSocket, WebSocketDisconnect
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from speechllm.pauses import Cut, quietest
from speechllm.pieces import LONGEST_S
from speechllm.serving.engine import Engine
from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.codec.streaming import StreamingEncoder
from tokenizer.errors import InputError
from tokenizer.frames import frame_count

INTERVAL_S = 1.0  # of new speech, after which the text so far is sent
SAMPLE = np.dtype("<i2")
MOST_BYTES = 2**20  # of a message
WAITING = 16  # messages
STEP_S = 10.0  # of speech that are encoded at a time
SILENCE_S = 60  # after which a speaker is taken to have left


class LiveSpeech:
    """One speaker's speech, transcribed again whenever enough is new.

    A causal codec encodes every sample once (`StreamingEncoder`); other tokenizers encode what is not settled again.
    What is older than `longest_s` is settled: cut off in a pause, and not transcribed again.
    """

    def __init__(
        self,
        engine: Engine,
        sample_rate: int,
        longest_s: float = LONGEST_S,
        interval_s: float = INTERVAL_S,
        cut: Cut = quietest,
    ):
        """sample_rate: in Hz, of the samples that come in; cut: says where in the settled speech there is a pause."""
        self.engine, self.rate, self.sample_rate = engine, engine.codec.sample_rate, sample_rate
        self.longest_s, self.interval_s, self.cut = longest_s, interval_s, cut
        self.encoder = _streaming_encoder(engine)
        self.resampler = soxr.ResampleStream(sample_rate, self.rate, 1, "float32") if sample_rate != self.rate else None
        self.waveform, self.codes = torch.zeros(0), torch.zeros(engine.speech_llm.vocabulary.encoding.layers, 0).long()
        self.hop = round(self.rate / (engine.codec.frame_rate or self.rate))  # samples a frame
        self.start_s, self.new_s, self.half = 0.0, 0.0, b""
        self.settled: list[str] = []

    @property
    def heard_s(self) -> float:
        return self.start_s + len(self.waveform) / self.rate

    async def add(self, content: bytes, last: bool = False) -> AsyncIterator[dict[str, Any]]:
        """The next samples, 16-bit little-endian: what to tell the speaker.

        A `segment` is settled, a `partial` text may still change, `done` has all of it and follows the `last` samples.
        """
        samples = self._samples(content, last)
        await self._encode(samples, last)
        self.waveform = torch.cat([self.waveform, samples])
        self.new_s += len(samples) / self.rate
        while len(self.waveform) > self.longest_s * self.rate:
            settling = self.waveform[: round(self.longest_s * self.rate)]
            cut = await run_in_threadpool(self.cut, settling, self.rate)  # a network may look for the pause
            yield await self._settle(cut // self.hop * self.hop)
        if last:
            if len(self.waveform):
                yield await self._settle(len(self.waveform))
            yield {"type": "done", "text": " ".join(filter(None, self.settled)), "end": round(self.start_s, 3)}
        elif self.new_s >= self.interval_s:
            self.new_s = 0.0
            yield self._told("partial", await self._text(len(self.waveform), fallback=False), len(self.waveform))

    def _samples(self, content: bytes, last: bool) -> Tensor:
        content = self.half + content
        whole = len(content) // SAMPLE.itemsize * SAMPLE.itemsize
        self.half = content[whole:]
        samples = np.frombuffer(content[:whole], SAMPLE).astype(np.float32) / 2**15
        return torch.from_numpy(samples if self.resampler is None else self.resampler.resample_chunk(samples, last))

    async def _encode(self, samples: Tensor, last: bool) -> None:
        if (encoder := self.encoder) is not None:
            codes = await asyncio.wrap_future(self.engine.call(lambda: encoder.push(samples).cpu()))
            if last:
                codes = torch.cat(
                    [codes, await asyncio.wrap_future(self.engine.call(lambda: encoder.finish().cpu()))], 1
                )
            self.codes = torch.cat([self.codes, codes], 1)

    async def _settle(self, cut: int) -> dict[str, Any]:
        text = await self._text(cut, fallback=True)
        told = self._told("segment", text, cut)
        self.settled.append(text)
        self.start_s += cut / self.rate
        self.codes, self.waveform = self.codes[:, frame_count(cut, self.hop) :], self.waveform[cut:].clone()
        return told

    async def _text(self, cut: int, fallback: bool) -> str:
        """What is said up to a sample that is not settled. fallback: not for a text that is replaced a second later."""
        if self.encoder is None:
            return (await asyncio.wrap_future(self.engine.transcribe(self.waveform[:cut], fallback))).text
        codes = self.codes[:, : frame_count(cut, self.hop)]
        if not codes.shape[1]:  # shorter than a frame
            return ""
        return (await asyncio.wrap_future(self.engine.recognize(codes, cut / self.rate, fallback))).text

    def _told(self, kind: str, text: str, cut: int) -> dict[str, Any]:
        return {
            "type": kind,
            "text": text,
            "start": round(self.start_s, 3),
            "end": round(self.start_s + cut / self.rate, 3),
        }


def _streaming_encoder(engine: Engine) -> StreamingEncoder | None:
    codec, encoding = engine.codec, engine.speech_llm.vocabulary.encoding
    if not isinstance(codec, SpeechCodec) or not codec.config.causal:
        return None
    return StreamingEncoder(codec, encoding.layers)


async def transcribe_live(socket: WebSocket, speech: LiveSpeech, max_duration_s: float) -> None:
    """Answer an accepted socket until its speaker says `end`, leaves or is silent for long.

    Binary messages hold samples, a text message ends the speech. What comes while the model works is taken together.
    Speech beyond `max_duration_s` and faults end with an `error`.
    """
    arrived: asyncio.Queue[bytes | WebSocketDisconnect | None] = asyncio.Queue(WAITING)  # when full, no more is read

    async def listen() -> None:
        end: WebSocketDisconnect | None = None
        try:
            while len(content := await socket.receive_bytes()) <= MOST_BYTES:
                await arrived.put(content)
        except KeyError:  # a text message
            pass
        except WebSocketDisconnect as left:
            end = left
        await arrived.put(end)

    listening = asyncio.create_task(listen())
    try:
        last = False
        while not last:
            parts = [await asyncio.wait_for(arrived.get(), SILENCE_S)]
            while not arrived.empty():
                parts.append(arrived.get_nowait())
            if isinstance(parts[-1], WebSocketDisconnect):
                raise parts[-1]
            content, last = b"".join(part for part in parts if isinstance(part, bytes)), None in parts
            if speech.heard_s + len(content) / SAMPLE.itemsize / speech.sample_rate > max_duration_s:
                raise InputError(f"at most {max_duration_s:g} s of speech are taken")
            step = SAMPLE.itemsize * round(STEP_S * speech.sample_rate)
            for start in range(0, max(len(content), 1), step):
                end = start + step >= len(content)
                async for event in speech.add(content[start : start + step], last and end):
                    await _tell(socket, event)
        await socket.close()
    except WebSocketDisconnect:
        pass  # the speaker has left
    except (InputError, TimeoutError) as error:
        await _fail(socket, str(error) or f"nothing was said for {SILENCE_S} s", 1008)
    except Exception:
        await _fail(socket, "the server failed; its log says why", 1011)
        raise
    finally:
        listening.cancel()


async def _tell(socket: WebSocket, event: dict[str, Any]) -> None:
    """Raises WebSocketDisconnect if nobody reads it."""
    try:
        await asyncio.wait_for(socket.send_json(event), SILENCE_S)
    except TimeoutError as error:
        raise WebSocketDisconnect from error


async def _fail(socket: WebSocket, message: str, code: int) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # who has left hears nothing of it
        await _tell(socket, {"type": "error", "message": message})
        await socket.close(code)
