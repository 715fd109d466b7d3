"""The benchmark of the server, on a tiny model in process."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import uvicorn
from torch import Tensor

from speechllm import SpeechLLM, save_audio
from speechllm.serving.app import make_app
from tokenizer.errors import InputError
from tokenizer.files import write_jsonl

RATE = 16_000


@pytest.fixture
def corpus(tmp_path: Path, noise: Callable[..., Tensor]) -> Path:
    rows = []
    for i in range(3):
        save_audio(tmp_path / f"{i}.flac", noise(RATE // 2 + 900 * i, seed=i)[0])
        rows.append({"path": f"{i}.flac", "duration_s": 0.5 + 900 * i / RATE, "split": "test"})
    write_jsonl(tmp_path / "manifest.jsonl", rows)
    return tmp_path


@pytest.fixture
def module(recipe: Callable, make_speech_llm: Callable[..., SpeechLLM], monkeypatch: pytest.MonkeyPatch) -> object:
    module = recipe("benchmark_serve.py")

    @contextmanager
    def served(model: str) -> Iterator[tuple[str, str, psutil.Process]]:
        server = uvicorn.Server(uvicorn.Config(make_app(make_speech_llm(), model), log_level="error"))
        socket = uvicorn.Config(None, port=0).bind_socket()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        yield f"http://127.0.0.1:{socket.getsockname()[1]}", model, psutil.Process()
        server.should_exit = True
        thread.join(30)

    monkeypatch.setattr(module, "served", served)
    return module


def test_every_part_is_measured_and_reported(
    module: object, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "results"
    sizes = {"recordings": 3, "requests": 7, "clients": 3, "bad": 8, "live": 1, "minutes": 0.05}
    module.main(module.ServeConfig(model="tiny", data=str(corpus), output=str(output), **sizes))
    results = json.loads((output / "results.json").read_text())
    assert results["alone"]["requests"] == 3 and results["together"]["requests"] == 7
    assert 0 < results["together"]["p50_s"] <= results["together"]["p95_s"]
    assert results["bad"]["statuses"] == {"400": 7, "404": 1}
    assert results["live"]["last"]["requests"] == 1 and results["live"]["last"]["p50_s"] < 30
    assert results["long"]["minutes"] == 0.05
    assert (output / "report.html").is_file() and "| together | 7 |" in capsys.readouterr().out


def test_answers_that_depend_on_others_are_counted(module: object) -> None:
    path, texts = Path("a.flac"), iter(["a", "a", "b", "a"])
    with pytest.raises(InputError, match="1 of 4 answers are not those"):
        module.together(lambda _: (next(texts), 0.1), [path] * 4, 1, {path: "a"})


def test_joined_recordings_have_the_length_that_was_asked_for(module: object, corpus: Path) -> None:
    content = module.joined(sorted(corpus.glob("*.flac")), 0.1)
    (corpus / "long.flac").write_bytes(content)
    assert len(module.load_audio(corpus / "long.flac", RATE)) == 6 * RATE


def test_latencies_are_a_median_and_a_percentile(module: object) -> None:
    assert module.latencies([float(i) for i in range(101)]) == {"requests": 101, "p50_s": 50, "p95_s": 95}
    assert module.latencies([2.0]) == {"requests": 1, "p50_s": 2.0, "p95_s": None}
    assert module.latencies([]) == {"requests": 0, "p50_s": None, "p95_s": None}
