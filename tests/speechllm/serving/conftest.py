"""A server of a tiny model, in process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from speechllm import SpeechLLM, save_audio

pytest.importorskip("fastapi", reason="needs the serve extra")

from fastapi.testclient import TestClient

from speechllm.serving.app import make_app
from speechllm.serving.engine import Engine

RATE = 16_000


@pytest.fixture
def speech_llm(make_speech_llm: Callable[..., SpeechLLM]) -> SpeechLLM:
    return make_speech_llm()


@pytest.fixture
def engine(speech_llm: SpeechLLM) -> Iterator[Engine]:
    engine = Engine(speech_llm)
    yield engine
    engine.close()


@pytest.fixture
def client(speech_llm: SpeechLLM) -> Iterator[TestClient]:
    with TestClient(make_app(speech_llm, "tiny"), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def recording(tmp_path: Path, noise: Callable[..., Tensor]) -> Path:
    save_audio(tmp_path / "a.flac", noise(RATE, seed=0)[0])
    return tmp_path / "a.flac"
