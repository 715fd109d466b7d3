"""One thread that works for many callers: utterances that wait are transcribed together, in batches."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from speechllm.decoding import Transcription, heard_letters, recognize
from speechllm.encoding import Speech
from speechllm.model import SpeechLLM

T = TypeVar("T")


@dataclass
class _Utterance:
    """Either a waveform float [N] or what it was encoded to, with its length."""

    waveform: Tensor | None
    encoded: Speech | None
    duration_s: float
    fallback: bool
    future: Future[Transcription] = field(default_factory=Future)


@dataclass
class _Call:
    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


Job = TypeVar("Job", _Utterance, _Call)


class Engine:
    """Transcribes for any number of threads in one of its own, which alone uses the model and the codec.

    What has gathered while a batch was computed is the next batch, so that a caller alone does not wait for others.
    Results do not depend on the batch (`recognize`). Callers bound what they submit.
    """

    def __init__(
        self,
        speech_llm: SpeechLLM,
        batch_size: int = 16,
        observe: Callable[[int], object] = lambda size: None,
        beams: int = 1,
        letters_weight: float = 0.0,
    ):
        """observe: is called with the size of every batch. beams, letters_weight: see `recognize`.

        Raises ValueError for a model without its codec, InputError for letters_weight as `recognize` does.
        """
        if speech_llm.codec is None:
            raise ValueError("this SpeechLLM has no codec: load it with load_speech_llm")
        if letters_weight:
            heard_letters([], speech_llm, letters_weight)  # what is wrong is said now, and what it takes is there
        self.speech_llm, self.codec, self.batch_size = speech_llm, speech_llm.codec, batch_size
        self.beams, self.letters_weight = beams, letters_weight
        self._observe = observe
        self._lock, self._closed = threading.Lock(), False
        self._waiting: queue.SimpleQueue[_Utterance | _Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="speechllm engine", daemon=True)
        self._thread.start()

    def transcribe(self, waveform: Tensor, fallback: bool = True) -> Future[Transcription]:
        """The text of a waveform float [N] at the codec's rate. fallback: see `speechllm.decoding.recognize`."""
        return self._submit(_Utterance(waveform, None, len(waveform) / self.codec.sample_rate, fallback)).future

    def recognize(self, encoded: Speech, duration_s: float, fallback: bool = True) -> Future[Transcription]:
        """The text of an encoded utterance. fallback: see `speechllm.decoding.recognize`."""
        return self._submit(_Utterance(None, encoded, duration_s, fallback)).future

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Something else that uses the codec, between the batches."""
        return self._submit(_Call(function)).future

    def close(self) -> None:
        """End the batch in progress and cancel what waits. Nothing can be submitted afterwards."""
        with self._lock:
            self._closed = True
            self._waiting.put(None)
        self._thread.join()  # without a limit: a process that ends while a thread of it computes is aborted

    def _submit(self, job: Job) -> Job:
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.put(job)
        return job

    def _work(self) -> None:
        jobs: list[_Utterance | _Call | None] = []
        while None not in jobs:
            jobs = self._next()
            for job in jobs:
                if self._closed and job is not None:
                    job.future.cancel()
            wanted = [job for job in jobs if job is not None and job.future.set_running_or_notify_cancel()]
            for fallback in (False, True):  # those that need no second search do not wait for it
                alike = [job for job in wanted if isinstance(job, _Utterance) and job.fallback == fallback]
                if alike:
                    self._answer(alike)
            for job in wanted:
                if isinstance(job, _Call):
                    _fulfil(job.future, job.function)

    def _next(self) -> list[_Utterance | _Call | None]:
        """Wait for a job; with those that wait behind it, up to a batch. The last one of all is None."""
        jobs = [self._waiting.get()]
        while jobs[-1] is not None and len(jobs) < self.batch_size:
            try:
                jobs.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return jobs

    def _answer(self, utterances: list[_Utterance]) -> None:
        self._observe(len(utterances))
        try:
            for utterance, found in zip(utterances, self._recognized(utterances), strict=True):
                utterance.future.set_result(found)
        except Exception as error:
            if len(utterances) == 1:
                utterances[0].future.set_exception(error)
            else:  # one that cannot be transcribed must not take the others along
                for utterance in utterances:
                    self._answer([utterance])

    @torch.inference_mode()
    def _recognized(self, utterances: list[_Utterance]) -> list[Transcription]:
        """The texts of utterances that are alike in their `fallback`."""
        encoding, speech = self.speech_llm.vocabulary.encoding, []
        for utterance in utterances:
            if utterance.waveform is not None:
                utterance.encoded = encoding.encode(self.codec, utterance.waveform)
            assert utterance.encoded is not None
            speech.append(utterance.encoded)
        return recognize(
            speech,
            self.speech_llm,
            beams=self.beams,
            fallback=utterances[0].fallback,
            durations_s=[utterance.duration_s for utterance in utterances],
            letters_weight=self.letters_weight,
        )


@torch.inference_mode()
def _fulfil(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
